"""The language model's training on two real processes (gloo) equals that on one at the same global batch.

In every step one process has rows of text alone, and the other has pictures or their features. `pytest -s` prints the
table.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM

from tests.transformers_puma.conftest import make_model, make_processor

from .training_runs import STEPS, WORLD_SIZE, load, make_arguments, run_trainer

ROOT = Path(__file__).parents[2]
RUNS = "tests.distributed.training_runs"
TOLERANCE = 1e-4  # relative


@pytest.fixture(scope="module", params=["autoregressive", "next_scale"])
def folder(request, tmp_path_factory) -> Path:
    """With the model that every run starts from, and the run on one process."""
    folder = tmp_path_factory.mktemp(request.param)
    make_model(make_processor(), image_decoding=request.param).save_pretrained(folder / "start")
    trainer = run_trainer(make_arguments(folder / "one", num_processes=1), load(folder))
    assert trainer.accelerator.num_processes == 1
    return folder


def torchrun(module: str, *arguments: str, **environment: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(WORLD_SIZE)]
    done = subprocess.run(
        [*command, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,  # processes that wait for each other would wait for ever
    )
    assert done.returncode == 0, done.stderr[-5000:]


def compare(folder: Path, name: str) -> None:
    """Losses of every step, and weights after the last, which plain `from_pretrained` reads."""
    start, one = load_file(folder / "start/model.safetensors"), load_file(folder / "one/model.safetensors")
    two = AutoModelForMultimodalLM.from_pretrained(folder / name).state_dict()
    assert two.keys() == one.keys()
    distance = max(relative(two[key], one[key]) for key in one)
    moved = max(relative(start[key], one[key]) for key in one)
    expected, found = (json.loads((folder / run / "losses.json").read_text()) for run in ("one", name))
    losses = torch.tensor([[float(entry["loss"]) for entry in history] for history in (expected, found)])
    assert losses.shape == (2, STEPS)
    difference = relative(losses[1], losses[0])
    print(
        f"\n{folder.name} {name}, {WORLD_SIZE} processes against one, relative: losses {difference:.1e}, "
        f"parameters {distance:.1e}, moved by {moved:.1e}; loss {losses[1, 0]:.4f} -> {losses[1, -1]:.4f}"
    )
    torch.testing.assert_close(losses[1], losses[0], rtol=TOLERANCE, atol=0)
    assert distance < TOLERANCE < moved
    for key in found[0].keys() & {"text_loss", "image_loss", "mse_scale_0"}:
        assert [float(e[key]) for e in found if key in e] == pytest.approx([float(e[key]) for e in expected], rel=1e-3)


def compare_evaluation(folder: Path, name: str) -> None:
    """Of three rows, which two processes cannot share evenly."""
    expected, found = (json.loads((folder / run / "evaluated.json").read_text()) for run in ("one", name))
    measured = [key for key in expected if key == "eval_loss" or key.endswith("_loss") or "mse_scale" in key]
    assert len(measured) > 3
    assert {key: found[key] for key in measured} == pytest.approx({key: expected[key] for key in measured}, rel=1e-3)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def test_data_parallel_and_sharded_by_torch(folder):
    torchrun(RUNS, str(folder), "ddp", "fsdp2")
    compare(folder, "ddp")
    compare_evaluation(folder, "ddp")
    compare(folder, "fsdp2")


def test_sharded_by_deepspeed(folder):
    torchrun(RUNS, str(folder), "zero3", DS_ACCELERATOR="cpu")
    compare(folder, "zero3")
    compare_evaluation(folder, "zero3")
