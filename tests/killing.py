"""Trainers that kill their own process with SIGKILL, which nothing can catch, and training run to its end."""

import json
import os
import signal
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
