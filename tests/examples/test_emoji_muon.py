"""The optimizer of the small language model against torch's own two, each on its parameters."""

import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR

from transformers_puma.training import PumaTrainingArguments

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "emoji"))

from emoji_training import StageArguments  # noqa: E402
from muon import MuonWithAdamW  # noqa: E402
from train_language_model import DRAWING, CachedData, train  # noqa: E402


def make() -> nn.Module:
    """An embedding, two layers, a head, and a module that is not trained."""
    torch.manual_seed(0)
    layers = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 4)])})
    frozen = nn.Linear(2, 2).requires_grad_(False)
    return nn.ModuleDict({"embedding": nn.Embedding(5, 4), "model": layers, "head": nn.Linear(4, 3), "frozen": frozen})


def loss_of(model: nn.Module) -> torch.Tensor:
    states = model["embedding"](torch.arange(5))
    for layer in model["model"]["layers"]:
        states = layer(states).tanh()
    return model["head"](states).square().sum()


def descend(model: nn.Module, optimizers: list, steps: int, schedules: list | None = None) -> None:
    for _ in range(steps):
        model.zero_grad()
        loss_of(model).backward()
        for part in [*optimizers, *(schedules or [])]:
            part.step()


def decayed(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.ndim == 2]


def optimizer_of(model: nn.Module) -> MuonWithAdamW:
    return MuonWithAdamW(model, decayed(model), lr=0.05, weight_decay=0.1)


def halving(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.5**step)


def assert_same(first: nn.Module, second: nn.Module) -> None:
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)


def test_matrices_of_layers_follow_muon_and_the_rest_adamw():
    ours, stock = make(), make()
    optimizer = optimizer_of(ours)
    layers = list(stock["model"]["layers"])
    muon = Muon([layer.weight for layer in layers], lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    with_decay = [stock["embedding"].weight, stock["head"].weight]
    without = [*(layer.bias for layer in layers), stock["head"].bias]
    adamw = AdamW([{"params": with_decay}, {"params": without, "weight_decay": 0.0}], lr=0.05, weight_decay=0.1)
    descend(ours, [optimizer], 4, [halving(optimizer)])
    descend(stock, [muon, adamw], 4, [halving(muon), halving(adamw)])
    assert_same(ours, stock)
    assert not torch.equal(ours["model"]["layers"][0].weight, make()["model"]["layers"][0].weight)


def test_a_loaded_state_goes_on_to_the_same_numbers():
    whole, resumed = make(), make()
    optimizer = optimizer_of(whole)
    descend(whole, [optimizer], 3)
    resumed.load_state_dict(whole.state_dict())
    later = optimizer_of(resumed)
    later.load_state_dict(deepcopy(optimizer.state_dict()))
    descend(whole, [optimizer], 3)
    descend(resumed, [later], 3)
    assert_same(whole, resumed)


def test_a_closure_gives_the_loss():
    model = make()
    optimizer = optimizer_of(model)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert torch.equal(first, loss_of(make()))
    assert optimizer.step(closure) < first


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("optim", "adafactor"),
        ("optim_args", "a=1"),
        ("adam_beta1", 0.5),
        ("adam_beta2", 0.5),
        ("adam_epsilon", 0.5),
        ("projector_learning_rate", 0.5),
    ],
)
def test_arguments_of_another_optimizer_are_for_adapters_alone(option, value, tmp_path):
    arguments = PumaTrainingArguments(str(tmp_path / "out"), **{option: value})
    rest = (None, StageArguments(data=str(tmp_path / "none")), arguments, CachedData(), DRAWING)
    with pytest.raises(ValueError, match=f"--{option} {value} has no part in Muon, .*: leave it at "):
        train(make(), *rest)
    with pytest.raises(FileNotFoundError, match="none"):  # of the data, which are read next
        train(get_peft_model(make(), LoraConfig(target_modules=["head"])), *rest)
