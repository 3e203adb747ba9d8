"""Sources, mixed with their ratios, to the training rows of a stage: `build_training_data`."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import IterableDataset

STAGES = ("decoder", "pretraining", "text_to_image", "editing", "conditional", "understanding")


def build_training_data(
    sources: Sequence[Mapping[str, Any]],
    stage: str,
    *,
    seed: int = 0,
    image_size: int | None = None,
    shuffle_buffer: int = 1000,
    stopping_strategy: str = "all_exhausted",
    max_broken_share: float = 0.05,
    min_samples: int = 1000,
) -> IterableDataset:
    """The stream of training rows of a stage.

    Args:
        sources: what to mix; each has `name` (a key of `SOURCES`), `path` (a file, folder, glob pattern, or a list of
            them), `weight` (the share of its rows, relative to the others; default 1) and the source's own options.
        stage: one of `STAGES`: "decoder", "pretraining", "text_to_image", "editing", "conditional", "understanding".
        seed: of the mixing, the shuffling, the crops and every other draw.
        image_size: side in pixels that cropped pictures are resized to; None leaves them as the crop has them.
        shuffle_buffer: how many samples are held (encoded) to draw from; 0 keeps the order of the files.
        stopping_strategy: of `datasets.interleave_datasets`: "all_exhausted" (the shorter sources are repeated until
            the longest is read), "all_exhausted_without_replacement" (each sample once) or "first_exhausted".
        max_broken_share: more than this share of broken samples of a source stops the stream.
        min_samples: how many samples of a source are read before `max_broken_share` counts.
    """
    raise NotImplementedError
