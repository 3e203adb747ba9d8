"""`puma eval understanding` on tiny models."""

import json

import pytest
from PIL import Image

from puma_cli import eval_understanding, main
from puma_cli.errors import UserError
from puma_cli.eval_understanding import BENCHMARKS, input_scales_table, scales_name
from transformers_puma import PumaConfig
from transformers_puma.evaluation import understanding


def test_the_command_knows_all_benchmarks():
    assert BENCHMARKS == tuple(understanding.BENCHMARKS)


@pytest.fixture
def table(tmp_path):
    """Three questions of one's own."""
    folder = tmp_path / "table"
    folder.mkdir()
    Image.radial_gradient("L").convert("RGB").save(folder / "a.png")
    rows = [{"image": "a.png", "question": f"Question {i}?", "answer": "noto"} for i in range(3)]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def ask(table, out, *options):
    run = ["--benchmark", "questions", "--data", str(table), "--out", str(out), "--max-new-tokens", "2"]
    return main(["eval", "understanding", *run, "--device", "cpu", *options])


def test_a_run_and_the_same_again(language_model_folder, table, tmp_path, capsys):
    assert ask(table, tmp_path / "out", "--model", str(language_model_folder)) == 0
    results = json.loads((tmp_path / "out/questions/results.json").read_text())
    assert results["num_samples"] == 3 and results["scores"]["questions"]["majority"]["mean"] == 100
    printed = capsys.readouterr().out
    assert "questions" in printed and "out/questions/results.json" in printed
    lines = (tmp_path / "out/questions/samples-00000.jsonl").read_text()
    assert ask(table, tmp_path / "out", "--model", str(language_model_folder)) == 0
    assert (tmp_path / "out/questions/samples-00000.jsonl").read_text() == lines


def test_whichever_process_ends_last_prints_the_table(tmp_path, table, language_model_folder, monkeypatch, capsys):
    """Of two models, another process may have ended with the first."""
    out, models = tmp_path / "out", ("--models", str(language_model_folder), str(language_model_folder) + "/.")
    assert ask(table, out, *models) == 0
    printed = capsys.readouterr().out
    evaluate = eval_understanding._evaluate
    found = iter([False, True])
    monkeypatch.setattr(eval_understanding, "_evaluate", lambda *a: evaluate(*a) if next(found) else None)
    assert ask(table, out, *models) == 0
    assert capsys.readouterr().out == printed and "questions" in printed


def test_models_that_read_different_scales(language_model_folder, table, tmp_path, capsys):
    coarse = tmp_path / "coarse"
    coarse.mkdir()
    for file in language_model_folder.iterdir():
        (coarse / file.name).symlink_to(file)
    (coarse / "config.json").unlink()
    config = PumaConfig.from_pretrained(language_model_folder)
    config.input_scales = [4]
    config.save_pretrained(coarse)
    assert ask(table, tmp_path / "out", "--models", str(language_model_folder), str(coarse)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].split() == ["scales", "questions"]
    assert [line.split()[0] for line in lines[-2:]] == ["f4", "f4-f0"]


def write_results(file, benchmark, metric, value, scales):
    settings = {"benchmark": benchmark, "model": "m", "data": "d", "input_scales": scales}
    scores = {benchmark: {"accuracy": {"mean": 1.0}, metric: {"mean": value}}}
    results = {"task": "understanding", "num_samples": 1, "scores": scores, "settings": settings, "headline": metric}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results))
    return file


def test_table_of_several_benchmarks(tmp_path):
    files = [
        write_results(tmp_path / "mme/a/results.json", "mme", "perception", 1234.56, [0, 1, 2, 3, 4]),
        write_results(tmp_path / "gqa/a/results.json", "gqa", "accuracy", 50.0, [0, 1, 2, 3, 4]),
        write_results(tmp_path / "gqa/b/results.json", "gqa", "accuracy", 40.04, [2]),
        write_results(tmp_path / "pope/c/results.json", "pope", "f1", 80.0, [0, 4]),
    ]
    assert [line.split() for line in input_scales_table(files)] == [
        ["scales", "mme", "gqa", "pope"],
        ["f2", "[1403.0]", "40.0", "[46.6]"],
        ["f4+f0", "80.0"],
        ["f4-f0", "1234.6", "[1445.5]", "50.0", "[61.0]"],
    ]
    twice = write_results(tmp_path / "gqa/d/results.json", "gqa", "accuracy", 41.0, [2])
    with pytest.raises(UserError, match="gqa was measured on another model that reads f2 too"):
        input_scales_table([*files, twice])


@pytest.mark.parametrize(
    ("scales", "name"), [([3], "f3"), ([0, 1, 2, 3, 4], "f4-f0"), ([1, 2], "f2-f1"), ([0, 4], "f4+f0")]
)
def test_names_of_scales(scales, name):
    assert scales_name(scales) == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "val"], "val.jsonl is missing"),
        (["--model", "{model}", "--models", "{model}"], "--model and --models exclude each other"),
        (["--model", "{decoders}"], "a question needs a language model"),
    ],
)
def test_mistakes(options, message, language_model_folder, decoders_folder, table, tmp_path, capsys):
    folders = {"model": language_model_folder, "decoders": decoders_folder}
    options = [option.format(**folders) for option in options]
    if "--model" not in options:
        options += ["--model", str(language_model_folder)]
    assert ask(table, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
