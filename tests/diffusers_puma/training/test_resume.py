"""A decoder's training that is killed, cut short or out of disk space goes on to what it would have been."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.killing import FullDisk, Poison, assert_same_weights, disk_emptied_after, losses
from transformers_puma.training.checkpoints import last_whole_checkpoint

from .tiny import main, tiny_unet, trainer

ROOT = Path(__file__).parents[3]
ARGUMENTS = {
    "max_steps": 10,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 4,
    "logging_steps": 3,
    "ema_decay": 0.9,
    "save_total_limit": 1,
}


def test_killed_run_goes_on_to_the_same_losses(tmp_path):
    unbroken, broken = str(tmp_path / "unbroken"), str(tmp_path / "broken")
    main(unbroken, json.dumps(ARGUMENTS))
    command = [sys.executable, "-m", "tests.diffusers_puma.training.tiny", broken]
    killed = subprocess.run([*command, json.dumps({**ARGUMENTS, "kill_in_step": 7})], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert last_whole_checkpoint(broken) == f"{broken}/checkpoint-4"

    main(broken, json.dumps(ARGUMENTS))
    ours, theirs = (json.loads(Path(folder, "rank_0.json").read_text()) for folder in (broken, unbroken))
    assert ours == theirs and len(ours["losses"]) == 6  # steps 3, 4, 6, 8, 9, 10: also where a checkpoint is
    ours, theirs = (load_file(Path(folder, "rank_0.safetensors")) for folder in (broken, unbroken))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert Path(broken, "rank_0.eval").read_text() == Path(unbroken, "rank_0.eval").read_text()


def test_finished_run_does_nothing_when_started_again(tmp_path):
    arguments = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    run, again = trainer(tmp_path, **arguments), trainer(tmp_path, **arguments)
    run.train(resume_from_checkpoint=True)
    assert again.train(resume_from_checkpoint=True).global_step == 3
    assert_same_weights(again.model, run.model)


def test_full_disk_stops_with_the_last_checkpoint_kept(tmp_path):
    run = trainer(tmp_path, callbacks=[FullDisk()], **ARGUMENTS)
    message = r"checkpoint-8 could not be written, with \d+ MiB free .*checkpoint-4;"
    with disk_emptied_after(), pytest.raises(OSError, match=message):
        run.train(resume_from_checkpoint=True)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]

    resumed, unbroken = trainer(tmp_path, **ARGUMENTS), trainer(tmp_path / "unbroken", **ARGUMENTS)
    resumed.train(resume_from_checkpoint=True)
    unbroken.train()
    assert losses(resumed) == losses(unbroken)
    assert_same_weights(resumed.model, unbroken.model)


def test_a_loss_that_is_no_number_stops_with_the_last_checkpoint_kept(tmp_path):
    run = trainer(tmp_path, callbacks=[Poison("on_step_begin", 5)], **ARGUMENTS)
    with pytest.raises(FloatingPointError, match=r"the loss of step 6 is nan.*checkpoint-4; resume_from"):
        run.train(resume_from_checkpoint=True)
    run = trainer(tmp_path / "later", callbacks=[Poison("on_step_end", 8)], **ARGUMENTS)
    with pytest.raises(FloatingPointError, match=r"is not finite after step 8: not saved.*checkpoint-4;"):
        run.train(resume_from_checkpoint=True)


def test_checkpoint_of_another_model_is_refused(tmp_path):
    trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, ema_decay=0.0).train()
    other = trainer(tmp_path, tiny_unet(16, use_position_table=True), max_steps=2, ema_decay=0.0)
    with pytest.raises(ValueError, match="checkpoint-1 is of another model: it has no position_table"):
        other.train(resume_from_checkpoint=True)
