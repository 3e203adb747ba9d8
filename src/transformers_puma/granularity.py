"""Multi-granular image features: pooling, order and positions. Pure functions; knows no model and no text.

An image is a square grid of encoder features. Scale 0 is that grid itself, scale i the grid average-pooled i times
by two (report section 3.1, equation 1), and a sequence holds the scales flattened from the coarsest to the finest.

Legend: B images, k_i tokens of scale i, C channels, N the coarsest scale, S = sum of all k_i.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig

MAX_SCALES = 5  # the report's


def num_scales_of_grid(grid_size: int) -> int:
    """As many scales as a grid of that side can be halved for, itself counted, but no more than the report's five."""
    lowest_set_bit = grid_size & -grid_size
    return min(MAX_SCALES, lowest_set_bit.bit_length())


def tokens_per_scale(grid_size: int, num_scales: int) -> list[int]:
    """Token counts k_0..k_N of a `grid_size` x `grid_size` grid; `(16, 5)` gives `[256, 64, 16, 4, 1]`."""
    if num_scales < 1 or grid_size % 2 ** (num_scales - 1):
        raise ValueError(
            f"num_scales={num_scales} does not fit a {grid_size} x {grid_size} grid: it must be at least 1 and the "
            "grid divisible by 2 ** (num_scales - 1)"
        )
    return [(grid_size // 2**scale) ** 2 for scale in range(num_scales)]


def encoder_tokens_per_scale(config: PreTrainedConfig) -> list[int]:
    """Token counts of as many scales as the grid of an encoder with that config has."""
    grid_size = config.image_size // config.patch_size
    return tokens_per_scale(grid_size, num_scales_of_grid(grid_size))


def multigranular_features(features: torch.Tensor, num_scales: int) -> list[torch.Tensor]:
    """Average-pools a feature grid into `num_scales` granularities (report equation 1).

    Args:
        features: (B, k_0, C) with k_0 a square number, row-major, or (B, H, W, C).
        num_scales: how many scales to return, the grid itself counted.

    Returns:
        A list whose item i is (B, k_i, C), finest first.
    """
    if features.dim() == 3:
        side = math.isqrt(features.shape[1])
        if side * side != features.shape[1]:
            raise ValueError(
                f"features of shape {tuple(features.shape)} are no square grid: {features.shape[1]} tokens"
            )
        features = features.unflatten(1, (side, side))
    if features.dim() != 4:
        raise ValueError(f"features must be (B, k, C) or (B, H, W, C), got {tuple(features.shape)}")
    for side in features.shape[1:3]:
        tokens_per_scale(side, num_scales)  # refuses what cannot be halved

    grid = features.permute(0, 3, 1, 2)
    grids = [grid]
    for _ in range(num_scales - 1):
        grids.append(F.avg_pool2d(grids[-1], kernel_size=2, stride=2))
    return [grid.flatten(2).transpose(1, 2) for grid in grids]


def flatten_scales(features: Mapping[int, torch.Tensor] | Sequence[torch.Tensor]) -> torch.Tensor:
    """Scales as one sequence (B, sum of k_i, C), coarsest first: the order in which they are read and written."""
    scales = features.keys() if isinstance(features, Mapping) else range(len(features))
    return torch.cat([features[scale] for scale in sorted(scales, reverse=True)], dim=1)


def split_scales(sequence: torch.Tensor, tokens_per_scale: Sequence[int]) -> dict[int, torch.Tensor]:
    """Inverse of `flatten_scales` for a sequence (B, n, C) that starts with the coarsest scale.

    A sequence that stops early (n < S) gives the scales that are complete in it.
    """
    scales, start = {}, 0
    for scale in reversed(range(len(tokens_per_scale))):
        stop = start + tokens_per_scale[scale]
        if stop > sequence.shape[1]:
            break
        scales[scale] = sequence[:, start:stop]
        start = stop
    return scales


def scale_of_position(tokens_per_scale: Sequence[int]) -> torch.Tensor:
    """(S,) long: the scale that stands at each position of an image's sequence, coarsest first."""
    scales = reversed(list(enumerate(tokens_per_scale)))
    return torch.cat([torch.full((count,), scale) for scale, count in scales])
