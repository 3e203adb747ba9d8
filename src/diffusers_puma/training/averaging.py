"""Averaged weights of a decoder, moved along by the trainer."""

from typing import Any

import torch
from diffusers.training_utils import EMAModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EMACallback(TrainerCallback):
    """Moves the averaged weights after every optimiser step, from wherever the run begins or resumes."""

    def __init__(self, ema: EMAModel, parameters: list[torch.nn.Parameter]) -> None:
        self.ema = ema
        self.parameters = parameters

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.ema.optimization_step = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.ema.step(self.parameters)
