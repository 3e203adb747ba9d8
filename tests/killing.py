"""Trainers that kill their own process with SIGKILL, which nothing can catch, whose disk is full, or whose weights are
no numbers; and what a training run ended with."""

import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback


class KillInStep(TrainerCallback):
    """Kills in the middle of a step, between two micro-batches."""

    def __init__(self, step: int):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_while_saving(trainer: Trainer, step: int) -> None:
    """Kills when the weights and the optimizer of that step are written, and the rest of the checkpoint is not."""
    stock = trainer._save_rng_state

    def save_rng_state(folder: str) -> None:
        if trainer.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        stock(folder)

    trainer._save_rng_state = save_rng_state


class FullDisk(TrainerCallback):
    """Lets no file grow beyond 20 kB once the first checkpoint is there: writing fails as on a full disk."""

    def on_save(self, args, state, control, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


@contextmanager
def disk_emptied_after() -> Iterator[None]:
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class Poison(TrainerCallback):
    """Makes a trained weight no number, as a gradient that overflows does: at `event`, a method of callbacks, when
    `step` steps are done."""

    def __init__(self, event: str, step: int):
        self.step = step
        setattr(self, event, self.poison)

    def poison(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            weight = next(parameter for parameter in model.parameters() if parameter.requires_grad)
            with torch.no_grad():
                weight.view(-1)[0] = float("nan")


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def write_result(trainer: Trainer, path: Path) -> None:
    """`path`.json and `path`.safetensors: what one process of a run ended with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"world_size": trainer.args.world_size, "losses": losses(trainer)}
    path.with_suffix(".json").write_text(json.dumps(result))
    weights = {name: weight.detach().contiguous() for name, weight in trainer.model.named_parameters()}
    save_file(weights, path.with_suffix(".safetensors"))


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    for (name, ours), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
