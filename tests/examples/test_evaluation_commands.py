"""The commands of examples/evaluation/README.md for the small model, on a tiny one and data with the same columns."""

import json
import shlex
from pathlib import Path

import datasets
import pytest

from puma_cli import main
from tests.diffusers_puma.conftest import make_decoder_components, make_language_model, make_processor
from tests.diffusers_puma.evaluation.conftest import distribution  # noqa: F401
from tests.transformers_puma.conftest import make_picture

PAGE = Path(__file__).parents[2] / "examples/evaluation/README.md"
COMMANDS = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("puma eval ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, and data sets with columns of build_dataset.py and emoji_evaluation.py."""
    from diffusers_puma import PumaPipeline

    folder, processor = tmp_path_factory.mktemp("checkout"), make_processor()
    components = {**make_decoder_components(), "mllm": make_language_model(processor), "processor": processor}
    PumaPipeline(**components, default_num_inference_steps=2).save_pretrained(folder / "model")
    pictures = [make_picture(seed) for seed in range(4)]
    one, two = pictures[:2], pictures[2:]

    def table(**columns) -> datasets.Dataset:
        made = datasets.Dataset.from_dict(columns)
        for name in {"image", "target"} & columns.keys():
            made = made.cast_column(name, datasets.Image())
        return made

    emoji = datasets.DatasetDict(heldout_concept=table(image=one, style=["noto"] * 2, name=["a", "b"]))
    emoji.save_to_disk(folder / "data/emoji")
    prompts = table(prompt=["a in noto style", "b"], target=two, type=["emoji"] * 2, names=[["a"], ["b"]])
    edits = table(image=one, prompt=["make it red", "turn"], target=two, type=["colour"] * 2)
    asked = {"question": ["Which style?"] * 2, "answer": ["noto", "twemoji"], "question_type": ["style"] * 2}
    parts = datasets.DatasetDict(prompts=prompts, edits=edits, questions=table(image=one, **asked))
    parts.save_to_disk(folder / "data/emoji-evaluation")
    return folder


def test_all_five_and_compare(folder, distribution, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(folder)
    asked = [shlex.split(command)[1:] for command in COMMANDS]
    assert [command[1] for command in asked] == [
        "reconstruction",
        "generation",
        "editing",
        "understanding",
        "features",
        "compare",
    ]
    for command in asked:
        more = [] if command[1] == "compare" else ["--model", "model", "--device", "cpu"]
        if command[1] not in ("compare", "understanding"):
            more += ["--lpips-weights", str(distribution), "--size", "32"]
        assert main([*command, *more]) == 0, capsys.readouterr().err
        plot = Path(command[command.index("--plot") + 1])
        assert plot.stat().st_size > 10_000 and str(plot) in capsys.readouterr().out
    results = {file.parts[2]: json.loads(file.read_text()) for file in Path("runs/eval").rglob("results.json")}
    assert results.keys() == {command[1] for command in asked[:-1]}
    assert all(result["num_samples"] == 2 and result["versions"] for result in results.values())
    assert results["features"]["scores"].keys() == {"vae", "0", "1", "2", "3", "4"}
