"""The whole recipe of the small model, one step a stage, and what is its own in it: rows, order, resumption."""

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

from diffusers_puma import PumaPipeline

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "emoji"))

import train  # noqa: E402
from build_dataset import FEATURES  # noqa: E402
from emoji_tasks import EmojiRows, TaskMix, caption  # noqa: E402

STYLES, COLOURS = ("round", "square"), ("red", "green", "blue", "orange")


def row(colour: str, style: str) -> dict:
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    (draw.ellipse if style == "round" else draw.rectangle)((16, 16, 48, 48), fill=colour)
    text = {"subgroup": "", "tone": "none", "gender": "none", "group": "things"}
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
    return path


def rows_of(mix: TaskMix, length: int = 64) -> EmojiRows:
    texts = [row(colour, style) for colour in COLOURS for style in STYLES]
    features = torch.arange(len(texts)).float()[:, None, None].expand(-1, 256, 2)
    return EmojiRows(texts, features, num_scales=5, batch_size=8, length=length, seed=0, mix=mix)


def test_rows_depend_on_seed_and_number_alone():
    first, second = rows_of(TaskMix()), rows_of(TaskMix())
    for i in (63, 0, 17):
        ours, theirs = first[i], second[i]
        assert all(
            torch.equal(a, b) for a, b in zip(ours.pop("image_features"), theirs.pop("image_features"), strict=True)
        )
        assert ours == theirs


def test_rows_of_a_batch_are_of_one_kind_and_end_at_one_scale():
    rows = rows_of(TaskMix(kinds=(0.25, 0.25, 0.25, 0.25), finest_scale=(0.2, 0.4, 0.4, 0, 0)), length=400)
    kinds = set()
    for start in range(0, 400, 8):
        batch = [rows[i] for i in range(start, start + 8)]
        form = {("messages" in r, r.get("finest_scale"), r.get("prompt") == "<image>") for r in batch}
        assert len(form) == 1
        kinds |= form
    assert len(kinds) == 1 + 1 + 3


def test_an_edit_is_the_same_emoji_in_the_style_that_is_asked_for():
    rows = rows_of(TaskMix(kinds=(0, 0, 0, 1)))
    for i in range(16):
        example = rows[i]
        source, target = (rows.texts[int(f[0, 0])] for f in example["image_features"])
        assert source["codepoints"] == target["codepoints"] and source["style"] != target["style"]
        assert target["style"] in example["prompt"] and example["prompt"].startswith("<image>")


def test_the_plain_caption():
    assert caption(row("red", "round")) == "red in round style"


def run(data: Path, folder: Path) -> str:
    command = [sys.executable, "examples/emoji/train.py", "--data", str(data), "--runs", str(folder / "runs")]
    command += ["--out", str(folder / "model"), "--max-steps", "1"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_one_command_trains_all_parts_and_goes_on_where_it_stopped(data, tmp_path):
    first = run(data, tmp_path)
    assert "data, " not in first and "done already: data" in first
    pipe = PumaPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert pipe.scales == [0, 1, 2, 3, 4]
    size = sum(path.stat().st_size for path in (tmp_path / "model").rglob("*.safetensors"))
    assert size < 60e6
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("red in round style", scale=4, num_inference_steps=2).images[0]
    assert picture.size == (64, 64)
    steps = json.loads((tmp_path / "runs/unet_0/training.json").read_text())["steps"]
    assert steps == 1

    (tmp_path / "model" / "model_index.json").unlink()
    again = run(data, tmp_path)
    started = [line.split(":")[0] for line in again.splitlines() if ": started" in line]
    assert [name.strip("\r\x1b[K") for name in started] == ["model"]


def test_a_stage_that_fails_stops_the_run_and_says_why(tmp_path):
    broken = train.Stage("broken", "build_dataset.py", ["--no-such-option"], tmp_path / "never")
    with pytest.raises(SystemExit, match="(?s)no-such-option.*broken failed with status 2"):
        train.run([broken], tmp_path, jobs=1)


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
