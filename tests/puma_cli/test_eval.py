"""`puma eval` as users call it: runs that share and resume their work, what is printed, and mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from puma_cli import main
from tests.diffusers_puma.evaluation.conftest import clip_name, distribution  # noqa: F401


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs `puma eval` in an empty folder: `run(*arguments)` -> (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments) -> tuple[int, str, str]:
        status = main(["eval", *map(str, arguments)])
        return (status, *capsys.readouterr())

    return call


@pytest.fixture
def fails(run):
    """`fails(text, *arguments)`: one line on stderr that holds `text`, and status 2."""

    def call(text: str, *arguments) -> None:
        status, out, err = run(*arguments)
        message = err.removesuffix("\n").split("\n")[-1]
        assert (status, out) == (2, "")
        assert message.startswith("puma: error: ") and text in message, message

    return call


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Five pictures of different contents in two folders."""
    folder = tmp_path_factory.mktemp("pictures")
    gradient = Image.linear_gradient("L").resize((40, 40))
    for index in range(5):
        channels = [gradient.rotate(90 * (index + channel)) for channel in range(3)]
        file = folder / f"n{index % 2}" / f"{index}.png"
        file.parent.mkdir(exist_ok=True)
        Image.merge("RGB", channels).save(file)
    return folder


STAGES = {"coding": "encoder and decoder", "prediction": "prediction", "drift": "drift"}


def read_results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_one_and_two_processes_give_the_same_numbers(
    run,
    decoders_folder,
    pictures,
    distribution,  # noqa: F811
    tmp_path,
):
    options = ["--model", decoders_folder, "--data", pictures, "--lpips-weights", distribution, "--scale", 3]
    options += ["--size", 32, "--device", "cpu"]
    status, out, _ = run("reconstruction", *options, "--out", "one", "--batch-size", 3)
    assert status == 0 and out.endswith("one/results.json\n")
    assert "scale 3  psnr_r" in out and "11.04" in out and "Emu2" in out

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "puma_cli", "eval", "reconstruction", *options, "--out", "two", "--batch-size", 2]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    subprocess.run(
        [str(part) for part in command], check=True, cwd=tmp_path, env=environment, capture_output=True, timeout=300
    )
    shares = [file.read_text().count("\n") for file in sorted(Path("two").glob("samples-*.jsonl"))]
    assert shares == [3, 2]
    one, two = read_results(Path("one")), read_results(Path("two"))
    assert one["settings"] == two["settings"] and one["num_samples"] == two["num_samples"] == 5
    for metric, score in one["scores"]["3"].items():
        assert score == pytest.approx(two["scores"]["3"][metric], abs=2e-2), metric


@pytest.fixture(scope="session")
def edits(tmp_path_factory, pictures) -> Path:
    """Two edits with captions and targets, which are captions with true pictures as well."""
    files = sorted(map(str, pictures.rglob("*.png")))
    rows = {"image": files[:2], "prompt": ["turn it", "again"], "output_caption": ["a", "b"], "target": files[2:4]}
    folder = tmp_path_factory.mktemp("edits") / "edits"
    table = Dataset.from_dict(rows).cast_column("image", ImageFeature()).cast_column("target", ImageFeature())
    table.save_to_disk(folder)
    return folder


def test_generation_editing_and_features(run, fails, full_folder, edits, distribution, clip_name):  # noqa: F811
    common = ["--model", full_folder, "--data", edits, "--scale", 3, "--size", 32, "--lpips-weights", distribution]
    status, out, _ = run("generation", *common, "--metrics", "clip", "lpips", "frechet_alexnet", "--clip", clip_name)
    scores = read_results(Path("runs/eval/generation"))["scores"]["3"]
    assert status == 0 and scores.keys() == {"clip_t", "clip_i", "lpips_t", "lpips_d", "frechet_alexnet"}
    assert "scale 3  clip_t" in out and "0.3000" in out

    status, out, _ = run("editing", *common, "--metrics", "clip", "lpips", "--clip", clip_name, "--out", "edits")
    assert status == 0 and read_results(Path("edits"))["settings"]["seeds"] == [0]
    assert read_results(Path("edits"))["scores"]["3"].keys() == {
        "clip_i",
        "clip_t",
        "psnr_t",
        "lpips_s",
        "lpips_t",
    }

    status, out, _ = run("features", *common, "--edits", "--out", "features", "--plot", "features.png")
    assert status == 0 and "vae      psnr" in out and out.endswith("features/results.json\nfeatures.png\n")
    assert Path("features.png").stat().st_size > 10_000
    (verdict,) = [line.split() for line in out.splitlines() if line.startswith("A, scale 3")]
    lost = [read_results(Path("features"))["scores"]["3"][f"lost_{name}"]["mean"] for name in STAGES]
    assert verdict[3:6] == [f"{value:.2f}" for value in lost]
    assert " ".join(verdict[6:]) == STAGES[list(STAGES)[lost.index(max(lost))]]
    assert {"nmse_forced", "psnr_free"} < read_results(Path("features"))["scores"]["3"].keys()

    fails("choose one", "generation", *common, "--metrics", "fid", "frechet_alexnet")
    fails("names one twice", "generation", *common, "--metrics", "lpips", "lpips")
    fails("no such file with Inception weights", "generation", *common, "--metrics", "fid", "--inception-weights", "w")


def test_captions_alone(run, fails, full_folder, distribution, clip_name, tmp_path):  # noqa: F811
    Dataset.from_dict({"caption": ["a cat"]}).save_to_disk(tmp_path / "captions")
    common = ["--model", full_folder, "--data", "captions", "--scale", 3, "--size", 32]
    common += ["--lpips-weights", distribution, "--out", "out"]
    drawing = ["generation", *common, "--clip", clip_name]
    fails("--metrics frechet_alexnet needs true pictures", *drawing, "--metrics", "clip", "frechet_alexnet")
    fails("lpips needs true pictures or several seeds", *drawing, "--metrics", "lpips", "--seeds", 0)
    fails("captions has no true pictures: the column image is missing", "features", *common)
    edits = {"image": ["a.png"], "prompt": ["turn it"]}  # noqa: F811
    Image.new("RGB", (8, 8)).save("a.png")
    Dataset.from_dict(edits).save_to_disk(tmp_path / "edits")
    fails("edits has no true pictures: the column target", "features", *common, "--data", "edits", "--edits")
    assert not Path("out").exists()
    assert run(*drawing)[0] == 0
    assert read_results(Path("out"))["scores"]["3"].keys() == {"clip_t", "lpips_d"}


def test_pictures_for_a_benchmarks_own_scorer(run, fails, full_folder, distribution):  # noqa: F811
    Path("prompts").mkdir()
    Path("prompts/cat.txt").write_text("a cat")
    options = ["generation", "--benchmark", "dpg", "--model", full_folder, "--data", "prompts", "--out", "dpg"]
    status, out, _ = run(*options)
    assert status == 0 and out.splitlines()[-2:] == ["dpg/results.json", "dpg/scale_3"]
    with Image.open("dpg/scale_3/cat.png") as sheet:
        assert sheet.size == (32, 32)
    fails("--lpips-weights does nothing with --benchmark", *options, "--lpips-weights", distribution)
    fails("takes 4 pictures of a prompt, got seeds [0]", *options, "--seeds", 0)
    fails("is not what geneval publishes", "generation", "--benchmark", "geneval", *options[3:])


def test_the_granularity_curve(run, fails, tmp_path):
    scores = {
        str(scale): {"lpips_d": {"mean": 0.1 + 0.1 * scale}, "psnr_r": {"mean": 20.0 - scale}} for scale in range(5)
    }
    for name, task in (("a", "reconstruction"), ("b", "reconstruction"), ("c", "editing")):
        (tmp_path / name).mkdir()
        settings = {"model": "m", "data": "d"}
        content = {"task": task, "scores": scores, "num_samples": 1, "settings": settings}
        (tmp_path / name / "results.json").write_text(json.dumps(content))
    status, out, _ = run("compare", "a", "b", "--plot", "curve.png")
    assert status == 0 and out.endswith("curve.png\n")
    with Image.open("curve.png") as curve:
        assert curve.size == (900, 675) and len(curve.convert("RGB").getcolors(2**20)) > 100
    both = Path("curve.png").read_bytes()
    run("compare", "a", "--plot", "curve.png")
    assert Path("curve.png").read_bytes() != both  # two runs of one model are two curves
    fails(
        "draws editing with numbers of clip_i and clip_t or of lpips_s and lpips_t", "compare", "c", "--plot", "c.png"
    )
    fails("must be a .png file", "compare", "a", "--plot", "curve.pdf")


def test_plots_of_edits_and_answers(run, tmp_path):
    def draw(task: str, scores: dict) -> bytes:
        content = {"task": task, "scores": scores, "num_samples": 1, "settings": {"model": "m", "data": "d"}}
        Path("results.json").write_text(json.dumps(content))
        assert run("compare", "results.json", "--plot", "plot.png")[0] == 0
        return Path("plot.png").read_bytes()

    def score(value: float) -> dict:
        return {"mean": value, "low": value - 1, "high": value + 1, "n": 3}

    edits = {str(scale): {"lpips_s": score(scale / 4), "lpips_t": score(0.5)} for scale in range(5)}
    unchanged = {"lpips_s": score(0.0), "lpips_t": score(0.8)}
    assert draw("editing", edits) != draw("editing", {**edits, "unchanged": unchanged})
    answers = {
        "questions": {"accuracy": score(60), "majority": score(50)},
        "questions: style": {"accuracy": score(70)},
    }
    without = {**answers, "questions": {"accuracy": score(60)}}
    assert draw("understanding", answers) != draw("understanding", without)


def test_compare_puts_results_beside_the_reports(run, fails, tmp_path):
    def write(name: str, task: str, scores: dict, **settings) -> Path:
        (tmp_path / name).mkdir()
        results = {"task": task, "num_samples": 3, "scores": scores}
        settings = {"model": name, "data": "d", **settings}
        (tmp_path / name / "results.json").write_text(json.dumps({**results, "settings": settings}))
        return tmp_path / name

    first = write("a", "generation", {"0": {"clip_i": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 3}}}, steps=4)
    second = write("b", "generation", {"0": {"fid": {"mean": 12.345}}, "max": {"clip_i": {"mean": 0.7}}}, steps=50)
    other = write("c", "editing", {})
    status, out, _ = run("compare", first, second / "results.json")
    lines = [line.split() for line in out.splitlines()]
    assert status == 0
    assert ["steps:", "A", "4,", "B", "50"] in lines
    assert ["scale", "0", "clip_i", "0.5000", "[0.4000,", "0.6000]", "0.6210"] in lines
    assert ["scale", "0", "fid", "12.35"] in lines
    assert ["max", "clip_i", "0.7000", "0.7360"] in lines
    assert ["SEED-X", "0.7290"] in lines

    ours = {"gqa": {"accuracy": {"mean": 50.0}}, "mme": {"perception": {"mean": 1400.0}}}
    _, out, _ = run("compare", write("understood", "understanding", ours))
    lines = [line.split() for line in out.splitlines()]
    assert ["gqa", "accuracy", "50.00", "60.60"] in lines and ["mme", "perception", "1400.00", "1490.30"] in lines
    assert ["LLaVA-v1.5", "62.00", "1510.70"] in lines  # table 4
    assert ["f4-f0", "61.00", "1445.50"] in lines and ["f4", "0.00", "1252.60"] in lines  # table 5
    _, out, _ = run("compare", write("own", "understanding", {"questions": {"accuracy": {"mean": 50.0}}}))
    assert "report" not in out

    fails("different evaluations: editing, generation", "compare", first, other)
    fails("no results", "compare", tmp_path / "nothing")
    (tmp_path / "text").write_text("{")
    fails("not valid JSON", "compare", tmp_path / "text")
    (tmp_path / "text").write_text("{}")
    fails("not the results file", "compare", tmp_path / "text")
    content = json.loads((first / "results.json").read_text())
    del content["settings"]["model"], content["scores"]
    (tmp_path / "text").write_text(json.dumps(content))
    fails("not the results file of an evaluation: it has no scores, settings.model", "compare", tmp_path / "text")
    for scores, message in (
        ({"3": {"clip_t": 0.3}}, "clip_t of 3 must be an object, got 0.3"),
        ({"3": {"clip_t": {}}}, "clip_t of 3 must have a number as mean, got {}"),
        ([], "scores must be an object, got []"),
    ):
        content = json.loads((first / "results.json").read_text()) | {"scores": scores}
        (tmp_path / "text").write_text(json.dumps(content))
        fails(message, "compare", tmp_path / "text")
    assert run("compare", write("features", "features", {"3": {}}))[0] == 0


def test_mistakes_are_one_line(run, fails, decoders_folder, pictures, distribution, tmp_path):  # noqa: F811
    model, weights = ["--model", decoders_folder], ["--lpips-weights", distribution]
    fails("no such data", "reconstruction", *model, "--data", "nowhere")
    fails("no such file with LPIPS weights", "reconstruction", *model, "--data", pictures, "--lpips-weights", "w")
    fails("no decoder for scale 2", "reconstruction", *model, "--data", pictures, *weights, "--scale", 2)
    (tmp_path / "empty").mkdir()
    fails("holds no pictures", "reconstruction", *model, "--data", "empty", *weights)
    Dataset.from_dict({"picture": [1]}).save_to_disk(tmp_path / "set")
    fails("has no column image, only picture", "reconstruction", *model, "--data", "set", *weights)
    fails("required", "reconstruction", *model)

    options = ["reconstruction", *model, "--data", pictures, *weights, "--scale", 4, "--size", 32, "--limit", 1]
    assert run(*options, "--out", "out")[0] == 0
    fails("guidance_scale = 2.0, and this one has 1.0", *options, "--guidance", 1, "--out", "out")
    fails("all different", *options, "--seeds", 1, 1)
