"""Features of one decoder: pooled from cached ones of the finest scale, their statistics, and a start that suits them.

Legend: B pictures, k_0 tokens of the finest scale, k of the decoder's, C feature channels.
"""

import math
from collections.abc import Iterable

import torch

from transformers_puma.granularity import multigranular_features
from transformers_puma.training import standardize_input

from ..unet_puma import PumaUNet2DConditionModel


def scale_of(num_tokens: int, finest_tokens: int) -> int:
    """The scale that has `num_tokens` tokens where the finest has `finest_tokens`.

    Raises:
        ValueError: no scale has that many.
    """
    scale = round(math.log(finest_tokens / num_tokens, 4))
    if scale < 0 or num_tokens * 4**scale != finest_tokens:
        raise ValueError(
            f"features of {finest_tokens} tokens cannot be pooled to {num_tokens}: each scale has a quarter of the "
            "tokens of the scale before"
        )
    return scale


def pool_to_tokens(features: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Features (B, k_0, C) average-pooled to the scale that has `num_tokens` tokens: (B, num_tokens, C).

    Features that are already at that scale come back as they are.

    Raises:
        ValueError: if no scale of these features has `num_tokens` tokens.
    """
    scale = scale_of(num_tokens, features.shape[1])
    return multigranular_features(features, scale + 1)[scale]


def feature_statistics(batches: Iterable[torch.Tensor], num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of every channel at the scale with `num_tokens` tokens; two of (C,), in fp32.

    Args:
        batches: training features in pieces of (B, k_0, C), such as `features.split(256)`.
    """
    count, total, total_of_squares = 0, 0.0, 0.0
    for features in batches:
        tokens = pool_to_tokens(features.double(), num_tokens).flatten(0, 1)
        count += tokens.shape[0]
        total = total + tokens.sum(0)
        total_of_squares = total_of_squares + tokens.square().sum(0)
    mean = total / count
    variance = total_of_squares / count - mean.square()
    return mean.float(), variance.clamp(min=0).sqrt().float()


def standardize_projection(unet: PumaUNet2DConditionModel, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Makes the decoder's projection see features of zero mean and unit variance from the first step on, in place.

    The standardisation is folded into the weight and bias of `encoder_hid_proj`, so the saved decoder is an ordinary
    one; see `standardize_input`.

    Args:
        mean, std: (C,), from `feature_statistics`.
    """
    standardize_input(unet.encoder_hid_proj, mean, std)
