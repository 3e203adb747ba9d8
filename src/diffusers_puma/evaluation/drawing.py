"""What all evaluations of pictures share: a pipeline's pictures of every scale and seed, the same in any batch, and
the tables of their scores."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from PIL import Image

from transformers_puma.evaluation.intervals import bootstrap_mean
from transformers_puma.evaluation.runner import Row, sample_seed

from ..pipeline_puma import PumaPipeline
from .pictures import as_square

MAX = "max"  # the row of results that takes each sample's best scale
REPORT_SIZE = 256


@dataclass
class Drawer:
    """Draws samples with a pipeline.

    pipe: with the decoders of `scales`.
    scales: to draw at.
    seeds: each sample is drawn once with each.
    size: pixels of the pictures to compare, to which everything is resized; by default 256, as in the report, or what
        the decoders draw where that is smaller.
    num_inference_steps, guidance_scale: of the pipeline.
    """

    pipe: PumaPipeline
    scales: list[int]
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    size: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float = 2.0

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be at least one and all different, got {self.seeds}")
        absent = [scale for scale in self.scales if scale not in self.pipe.scales]
        if absent or not self.scales:
            raise ValueError(f"scales {self.scales} are to be drawn, and the pipeline has {self.pipe.scales}")
        if self.size is None:
            finest = getattr(self.pipe, f"unet_{min(self.scales)}")
            self.size = min(REPORT_SIZE, finest.config.sample_size * self.pipe.vae_scale_factor)
        if self.num_inference_steps is None:
            self.num_inference_steps = self.pipe.config.default_num_inference_steps

    def settings(self) -> dict[str, Any]:
        """What of this decides the numbers."""
        return {
            "scales": sorted(self.scales),
            "seeds": self.seeds,
            "size": self.size,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "scheduler": type(self.pipe.scheduler).__name__,
            "dtype": str(self.pipe.dtype).removeprefix("torch."),
        }

    def require_one_seed(self) -> None:
        """Raises `ValueError` for several, where they would be drawn and not looked at."""
        if len(self.seeds) > 1:
            raise ValueError(f"this evaluation draws each sample once, got seeds {self.seeds}")

    def draw(self, ids: list[int | str], resize: bool = True, **inputs: Any) -> dict[int, list[list[Image.Image]]]:
        """Pictures of a batch.

        Args:
            ids: of the samples; with a seed they decide the noise.
            resize: to `size`; False leaves the decoders' own.
            inputs: of the pipeline, a row for each sample.

        Returns:
            `{scale: pictures}`, for each sample a list with a picture for each seed.
        """
        # Noise is drawn on the CPU, so that a seed gives the same picture on every device.
        generators = [torch.Generator().manual_seed(sample_seed(seed, i)) for i in ids for seed in self.seeds]
        drawn = self.pipe(
            **inputs,
            scale=self.scales,
            num_images_per_prompt=len(self.seeds),
            generator=generators,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
        ).images
        if resize:
            drawn = {
                scale: [as_square(picture, self.size) for picture in pictures] for scale, pictures in drawn.items()
            }
        count = len(self.seeds)
        return {
            scale: [pictures[start : start + count] for start in range(0, len(pictures), count)]
            for scale, pictures in drawn.items()
        }


def mean_over_pairs(distance, first: list[list[Any]]) -> list[float]:
    """For each sample the mean of `distance` over all pairs of its seeds.

    Args:
        distance: (list, list) of n pictures each -> (n,) tensor.
        first: for each sample its pictures, one for each seed, at least two.
    """
    pairs = list(combinations(range(len(first[0])), 2))
    values = [distance([group[i] for group in first], [group[j] for group in first]) for i, j in pairs]
    return torch.stack(values).mean(0).tolist()


def add_scores(rows: list[Row], name: str, scores: dict[str, list[float]]) -> None:
    """Metrics with a value for each row -> `{metric: value}` in each row's `scores`, under `name`."""
    for index, row in enumerate(rows):
        row["scores"][name] = {metric: values[index] for metric, values in scores.items()}


def means(rows: list[Row], name: str) -> dict[str, dict[str, float]]:
    """Means and intervals of what `add_scores` put under `name`."""
    return {
        metric: bootstrap_mean([row["scores"][name][metric] for row in rows]) for metric in rows[0]["scores"][name]
    }


def summarize(
    rows: list[Row], scales: list[int], best: dict[str, Callable] | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """`means` of each scale.

    Args:
        best: metric -> `max` or `min`; adds a row that takes the best scale of each sample for those of these metrics
            that were measured, each metric for itself ("5-scale max" of report tables 2, 3 and 6).
    """
    scores = {str(scale): means(rows, str(scale)) for scale in sorted(scales)}
    measured = [name for name in best or {} if name in scores[str(scales[0])]]
    if measured and len(scales) > 1:
        scores[MAX] = {
            name: bootstrap_mean([best[name](row["scores"][str(scale)][name] for scale in scales) for row in rows])
            for name in measured
        }
    return scores
