"""A decoder's training on two real processes (gloo) equals that on one at the same global batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.diffusers_puma.training.tiny import main
from transformers_puma.training.checkpoints import missing_files

ROOT = Path(__file__).parents[2]
ARGUMENTS = {
    "max_steps": 20,
    "gradient_accumulation_steps": 2,
    "ema_decay": 0.9,
    "save_strategy": "steps",
    "save_steps": 8,
    # The processes' parts of a gradient are summed in another order, and Adam divides by its size.
    "adam_epsilon": 1e-4,
    "image_dropout": 0.3,
}


def torchrun(folder: Path, arguments: dict) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    module = ["-m", "tests.diffusers_puma.training.tiny", str(folder), json.dumps(arguments)]
    return subprocess.run([*command, *module], cwd=ROOT, capture_output=True, text=True)


def test_two_processes_equal_one_also_when_resumed(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    main(str(one), json.dumps({**ARGUMENTS, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4}))
    halves = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 2, "again_from": 8}
    finished = torchrun(two, {**ARGUMENTS, **halves})
    assert finished.returncode == 0, finished.stderr
    assert not missing_files(two / "checkpoint-8") and (two / "checkpoint-8" / "rng_state_1.pth").is_file()

    expected = json.loads((one / "rank_0.json").read_text())
    weights = load_file(one / "rank_0.safetensors")
    for rank in range(2):
        result = json.loads((two / f"rank_{rank}.json").read_text())
        assert (expected["world_size"], result["world_size"]) == (1, 2)
        assert len(result["losses"]) == 20
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        torch.testing.assert_close(load_file(two / f"rank_{rank}.safetensors"), weights, rtol=1e-4, atol=1e-6)
        assert float((two / f"rank_{rank}.eval").read_text()) == pytest.approx(
            float((one / "rank_0.eval").read_text()), rel=1e-4
        )
