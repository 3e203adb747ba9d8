"""A start for what reads and writes image features that suits the encoder."""

import torch
from torch import nn

from ..image_head_puma import PumaFlowHead
from ..modeling_puma import PumaForConditionalGeneration


@torch.no_grad()
def standardize_input(layer: nn.Linear, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Makes a layer see features of zero mean and unit variance, by its weight and bias, in place.

    A channel that hardly varies (under a thousandth of the mean deviation) is not blown up.

    Args:
        mean, std: (C,) per channel of the features.
    """
    layer.weight.div_(_without_zeros(std).to(layer.weight))
    layer.bias.sub_(layer.weight @ mean.to(layer.weight))


@torch.no_grad()
def standardize_feature_heads(model: PumaForConditionalGeneration, mean: torch.Tensor, std: torch.Tensor):
    """Folds the encoder's statistics into a freshly initialised projector and image head, in place.

    The projector then starts as if it read standardised features, and the head as if it wrote them: an encoder's
    channels differ in scale by orders of magnitude, and nothing else in the sequence normalises them.

    Args:
        mean, std: (C,) per channel of the encoder's features.
    """
    standardize_input(model.model.projector, mean, std)
    head, std = model.image_head, _without_zeros(std)
    if isinstance(head, PumaFlowHead):
        head.mean.copy_(mean)
        head.std.copy_(std)
        return
    head.weight *= std.to(head.weight)[:, None]
    head.bias.mul_(std.to(head.weight)).add_(mean.to(head.weight))


def _without_zeros(std: torch.Tensor) -> torch.Tensor:
    return std.clamp(min=1e-3 * std.mean().item())
