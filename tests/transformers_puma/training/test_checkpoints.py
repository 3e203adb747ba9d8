"""Every trainer of the language model: killed, cut short, without a loss, it goes on to what it would have been."""

import json
import multiprocessing
import os
import shutil
import signal

import pytest
import torch
from datasets import IterableDataset
from safetensors.torch import load_file

from tests.killing import FullDisk, Poison, assert_same_weights, disk_emptied_after, kill_while_saving, losses
from transformers_puma.training import (
    PumaDPOConfig,
    PumaDPOTrainer,
    PumaSFTConfig,
    PumaSFTTrainer,
    PumaTrainer,
    PumaTrainingArguments,
    last_whole_checkpoint,
    puma_lora_config,
    puma_token_ids,
)
from transformers_puma.training.checkpoints import MANIFEST_NAME, missing_files

from ..conftest import make_model, make_picture

PICTURES = [make_picture(i) for i in range(6)]
DRAWN = [{"prompt": f"picture {i}", "completion": "<image>", "images": PICTURES[i : i + 1]} for i in range(3)]
READ = [{"prompt": "<image>", "completion": "words " * i, "images": PICTURES[i : i + 1]} for i in range(3, 6)]
PREFERRED = [
    {"prompt": "<image>what?", "chosen": "cat", "rejected": "no", "images": [picture]} for picture in PICTURES
]
KINDS = ["noisy", "sft with LoRA on a stream", "dpo"]
OPTIONS = {
    "max_steps": 7,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 2,
    "save_steps": 3,
    "save_total_limit": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def make_trainer(kind: str, processor, folder, **options) -> PumaTrainer | PumaSFTTrainer | PumaDPOTrainer:
    model = make_model(processor)
    options = {**OPTIONS, **options}
    if kind == "noisy":
        arguments = PumaTrainingArguments(str(folder), feature_noise=0.5, **options)
        return PumaTrainer(model, arguments, processing_class=processor, train_dataset=DRAWN + READ)
    if kind == "sft with LoRA on a stream":
        return PumaSFTTrainer(
            model,
            PumaSFTConfig(str(folder), gradient_checkpointing=False, **options),
            # Five rows: the checkpoint of step 3, which has seen six, is within the second pass over the stream.
            train_dataset=IterableDataset.from_generator(lambda: iter((DRAWN + READ)[:5])),
            processing_class=processor,
            peft_config=puma_lora_config(model, puma_token_ids(processor)),
        )
    return PumaDPOTrainer(
        model,
        None,
        PumaDPOConfig(str(folder), **options),
        train_dataset=IterableDataset.from_generator(lambda: iter(PREFERRED[:5])),
        processing_class=processor,
    )


def train_until_killed(kind: str, processor, folder) -> None:
    trainer = make_trainer(kind, processor, folder)
    kill_while_saving(trainer, step=6)
    trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_run_goes_on_to_the_same_losses(processor, tmp_path, kind):
    unbroken = make_trainer(kind, processor, tmp_path / "unbroken")
    unbroken.train(resume_from_checkpoint=True)

    broken = tmp_path / "broken"
    # Not forked: autograd cannot go on in a fork of a process in which it had threads, as another test may have made.
    process = multiprocessing.get_context("spawn").Process(target=train_until_killed, args=(kind, processor, broken))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (broken / "checkpoint-6").is_dir() and last_whole_checkpoint(broken) == f"{broken}/checkpoint-3"

    resumed = make_trainer(kind, processor, broken)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(unbroken) and len(losses(resumed)) == 5  # steps 2, 3, 4, 6, 7
    assert_same_weights(resumed.model, unbroken.model)
    assert [path.name for path in broken.glob("checkpoint-*")] == ["checkpoint-7"]


@pytest.fixture(scope="module")
def trained(processor, tmp_path_factory):
    """A run with the whole checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = make_trainer("noisy", processor, folder, max_steps=4, save_steps=2, save_total_limit=None)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "rng_state.pth", "scheduler.pt"])
@pytest.mark.parametrize("rest", [None, 0, 0.9])
def test_checkpoint_cut_short_is_not_taken_for_whole(trained, tmp_path, name, rest):
    folder = shutil.copytree(trained.args.output_dir, tmp_path / "cut")
    path = folder / "checkpoint-4" / name
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-4")
    if rest is None:
        path.unlink()
    else:
        os.truncate(path, int(path.stat().st_size * rest))
    assert missing_files(folder / "checkpoint-4") == [name]
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-2")


def test_folders_that_are_no_checkpoints_are_left_aside(trained, tmp_path):
    assert last_whole_checkpoint(tmp_path / "absent") is None
    folder = shutil.copytree(trained.args.output_dir, tmp_path / "run")
    (folder / "checkpoint-best").mkdir()
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-11").write_text("")
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-4")
    (folder / "checkpoint-4" / MANIFEST_NAME).unlink()
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-2")


def test_resuming_from_a_cut_checkpoint_by_name_is_refused(processor, trained, tmp_path):
    folder = shutil.copytree(trained.args.output_dir, tmp_path / "cut")
    (folder / "checkpoint-4" / "optimizer.pt").unlink()
    trainer = make_trainer("noisy", processor, tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-4 is not whole: \['optimizer.pt'\] missing or cut short"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    trainer = make_trainer("noisy", processor, tmp_path, save_only_model=True)
    with pytest.raises(ValueError, match="needs save_only_model=False"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("event", "step", "message"),
    [
        ("on_step_begin", 4, r"the loss of step 5 is nan.*checkpoint-3; resume_from_checkpoint=True goes on from it"),
        ("on_step_end", 6, r"is not finite after step 6: not saved.*checkpoint-3;"),
        ("on_step_begin", 1, r"the loss of step 2 is nan. There is no whole checkpoint"),
    ],
)
def test_a_loss_that_is_no_number_stops_with_the_last_checkpoint_kept(processor, tmp_path, kind, event, step, message):
    trainer = make_trainer(kind, processor, tmp_path)
    trainer.add_callback(Poison(event, step))
    with pytest.raises(FloatingPointError, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == (["checkpoint-3"] if step > 3 else [])
    if step > 3:
        assert not missing_files(tmp_path / "checkpoint-3")
        (weights,) = (tmp_path / "checkpoint-3").glob("*model.safetensors")
        assert all(torch.isfinite(weight).all() for weight in load_file(weights).values())
        state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
        assert state["global_step"] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_stops_with_the_last_checkpoint_kept(processor, tmp_path, kind):
    trainer = make_trainer(kind, processor, tmp_path)
    trainer.add_callback(FullDisk())
    message = r"checkpoint-6 could not be written, with \d+ MiB free .*checkpoint-3; resume_from_checkpoint=True"
    with disk_emptied_after(), pytest.raises(OSError, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not missing_files(tmp_path / "checkpoint-3")
