"""The whole recipe of the small model, one step a stage, and what is its own in it: order and resumption."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from diffusers_puma import PumaPipeline
from transformers_puma.evaluation.runner import claim_folder

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "emoji"))

import average_weights  # noqa: E402
import compare_adapters  # noqa: E402
import train  # noqa: E402
from build_dataset import FEATURES  # noqa: E402
from build_scenes import load_scenes  # noqa: E402

STYLES, COLOURS = ("round", "square"), ("red", "green", "blue", "orange")


def row(colour: str, style: str) -> dict:
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    (draw.ellipse if style == "round" else draw.rectangle)((16, 16, 48, 48), fill=colour)
    text = {"subgroup": "", "tone": "none", "gender": "none", "group": "objects"}
    return {
        "image": image,
        "style": style,
        "tags": [colour],
        "name": colour,
        "codepoints": colour,
        "base": colour,
        **text,
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    rows = [row(colour, style) for colour in COLOURS for style in STYLES]
    splits = {"train": rows * 13, "heldout_concept": [row("brown", "round")], "heldout_pair": rows[:2]}
    path = tmp_path_factory.mktemp("recipe") / "emoji"
    DatasetDict({k: Dataset.from_list(v, features=FEATURES) for k, v in splits.items()}).save_to_disk(str(path))
    (path / "LICENSES.md").write_text("Drawn by this test.")
    return path


def run(data: Path, folder: Path) -> str:
    command = [sys.executable, "examples/emoji/train.py", "--data", str(data), "--runs", str(folder / "runs")]
    command += ["--out", str(folder / "model"), "--max-steps", "1"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_one_command_trains_all_parts_and_goes_on_where_it_stopped(data, tmp_path):
    first = run(data, tmp_path)
    assert "data, " not in first and "done already: data" in first
    scenes = load_file(tmp_path / "runs/cache/scenes_train.safetensors")
    assert len(scenes["features"]) == len(load_scenes(f"{data}-scenes-trial")["train"]) == len(scenes["latents"])
    pipe = PumaPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert pipe.scales == [0, 1, 2, 3, 4]
    size = sum(path.stat().st_size for path in (tmp_path / "model").rglob("*.safetensors"))
    assert size < 60e6
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("red in round style", scale=4, num_inference_steps=2).images[0]
    assert picture.size == (64, 64)
    steps = json.loads((tmp_path / "runs/unet_0/training.json").read_text())["steps"]
    assert steps == 1

    # Another run goes on from this model: its encoder and VAE, and its decoders trained on.
    command = [sys.executable, "examples/emoji/take_parts.py", "--model", str(tmp_path / "model")]
    subprocess.run([*command, "--runs", str(tmp_path / "more")], cwd=ROOT, check=True)
    for part in ("encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        trained, taken = load_file(tmp_path / "runs" / part), load_file(tmp_path / "more" / part)
        assert trained.keys() == taken.keys()
        assert all(torch.equal(trained[name].half(), taken[name].half()) for name in trained)

    # The mean of two language models, each weight for itself.
    models = [str(tmp_path / "runs" / name) for name in ("mllm_copying", "mllm_tuned")]
    command = [sys.executable, "examples/emoji/average_weights.py", "--out", str(tmp_path / "mean")]
    subprocess.run([*command, "--models", *models], cwd=ROOT, check=True)
    first, second, mean = (load_file(Path(folder, "model.safetensors")) for folder in (*models, tmp_path / "mean"))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for name, weight in mean.items():
        torch.testing.assert_close(weight, (first[name] + second[name]) / 2)

    # Adapters to the tuned language model, one for each task, each measured before and after.
    adapters = tmp_path / "adapters"
    options = {"data": data, "scenes": f"{data}-scenes-trial", "cache": tmp_path / "runs/cache", "out": adapters}
    options |= {"pretrained": tmp_path / "runs/mllm_tuned", "steps": 1, "rank": 2}
    chosen = ["--only", "draw", "ask", "--", "--per_device_train_batch_size", "8"]
    compare_adapters.main([str(part) for name, value in options.items() for part in (f"--{name}", value)] + chosen)
    results = json.loads((adapters / "adapters.json").read_text())["results"]
    assert list(results) == ["draw", "ask"]
    assert all(result["before"] != result["after"] for result in results.values())
    saved = load_file(adapters / "ask" / "adapter_model.safetensors")
    assert any("lora_A" in name for name in saved) and not any("vision_tower" in name for name in saved)
    assert "| understanding | " in (adapters / "adapters.md").read_text()

    (tmp_path / "model" / "model_index.json").unlink()
    again = run(data, tmp_path)
    started = [line.split(":")[0] for line in again.splitlines() if ": started" in line]
    assert [name.strip("\r\x1b[K") for name in started] == ["model"]


def test_models_of_other_shapes_have_no_mean():
    with pytest.raises(ValueError, match=r"model 2 has bias as torch.Size\(\[3\]\), the first as torch.Size\(\[2\]\)"):
        average_weights.average([torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)])


def test_stages_from_a_trained_model(tmp_path):
    todo = train.stages(*map(Path, ("data", "scenes", "runs", "out")), "cpu", None, pretrained=Path("trained"))
    by_name = {stage.name: stage for stage in todo}
    assert "encoder" not in by_name and by_name["cache"].needs == ("scenes", "parts")
    assert by_name["unet_2"].arguments[-2:] == ["--pretrained", "trained/unet_2"]


def test_a_folder_that_holds_another_model_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path), "--runs", str(tmp_path / "runs")])
    with pytest.raises(SystemExit, match="holds a model already: expected --out to be a new folder"):
        train.main()
    assert list((tmp_path / "runs").iterdir()) == []


def test_parts_of_a_trial_are_not_taken_for_those_of_the_recipe(tmp_path, monkeypatch):
    claim_folder(tmp_path / "runs", {"preset": "cpu", "max_steps": 1})
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")])
    with pytest.raises(SystemExit, match="holds a run with max_steps = 1, and this one has None"):
        train.main()


def test_a_stage_that_fails_stops_the_run_and_says_why(tmp_path):
    broken = train.Stage("broken", "build_dataset.py", ["--no-such-option"], tmp_path / "never")
    with pytest.raises(SystemExit, match="(?s)no-such-option.*broken failed with status 2"):
        train.run([broken], tmp_path, jobs=1)


def test_a_stage_that_all_others_wait_for_has_all_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    script = tmp_path / "threads.py"
    script.write_text(
        "import os, sys, time; time.sleep(2); open(sys.argv[1], 'w').write(os.environ['OMP_NUM_THREADS'])"
    )

    def stage(name: str, *needs: str) -> train.Stage:
        return train.Stage(name, str(script), [str(tmp_path / name)], tmp_path / name, needs)

    train.run([stage("first"), stage("second", "first"), stage("third", "first")], tmp_path, jobs=2)
    assert [(tmp_path / name).read_text() for name in ("first", "second", "third")] == ["8", "4", "4"]


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    """Also when only the first run's own process was killed and a stage of it goes on."""
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import os, time; os.symlink(str(os.getpid()), 'started'); time.sleep(60)")
    code = (
        f"import train; train.run([train.Stage('s', {str(sleeper)!r}, [], train.Path('never'))], train.Path('.'), 1)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "examples" / "emoji")}
    first = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    while not (tmp_path / "started").is_symlink():
        time.sleep(0.05)
    first.kill()
    first.wait()
    with pytest.raises(SystemExit, match="another run"):
        train.run([], tmp_path, jobs=1)
    os.kill(int(os.readlink(tmp_path / "started")), signal.SIGKILL)
