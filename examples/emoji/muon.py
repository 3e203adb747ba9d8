"""Muon for the matrices of a language model, AdamW for the rest of it."""

from dataclasses import fields

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from transformers_puma.training import PumaTrainingArguments

# Of an optimizer that `MuonWithAdamW` takes the place of.
UNUSED = ("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "projector_learning_rate")


def check_unused(arguments: PumaTrainingArguments) -> None:
    """Raises `ValueError` for an argument that has no part in `MuonWithAdamW` and is not its default."""
    values = arguments.to_dict()
    for field in fields(arguments):
        if field.name in UNUSED and values[field.name] != field.default:
            raise ValueError(
                f"--{field.name} {values[field.name]} has no part in Muon, which trains a whole model: leave it at "
                f"{field.default}"
            )


class MuonWithAdamW(Optimizer):
    """Muon for the matrices of the decoder layers, AdamW for embeddings, heads, norms and biases.

    Muon's steps are scaled to the size of AdamW's (https://arxiv.org/abs/2502.16982), so that one learning rate and
    one weight decay serve both.

    Args:
        model: what is trained; parameters without `requires_grad` are left out.
        decayed: names of the parameters that weight decay is for.
    """

    def __init__(self, model: nn.Module, decayed: list[str], lr: float, weight_decay: float):
        matrices, others, undecayed = [], [], []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".layers." in name and parameter.ndim == 2:
                matrices.append(parameter)
            elif parameter.requires_grad:
                (others if name in decayed else undecayed).append(parameter)
        groups = [{"params": others}, {"params": undecayed, "weight_decay": 0.0}]
        self.muon = Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = AdamW(groups, lr=lr, weight_decay=weight_decay)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Both work on the groups and the state of the whole, which are what is scheduled and saved."""
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self.muon.state = self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure=None):
        """One step of both. `closure` computes the loss anew, as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss
