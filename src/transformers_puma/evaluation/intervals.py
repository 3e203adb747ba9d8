"""Scores of independent samples, each with its percentile bootstrap interval."""

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 1000
DRAWN_AT_ONCE = 2**22  # indices
CONFIDENCE = 0.95


def bootstrap_mean(values: Sequence[float]) -> dict[str, float]:
    """Mean of independent samples and its interval: `mean`, `low`, `high` and `n`."""
    return bootstrap_statistic([np.asarray(values, dtype=np.float64)], lambda means: means[0])


def bootstrap_statistic(
    strata: Sequence[np.ndarray], statistic: Callable[[list[np.ndarray]], np.ndarray]
) -> dict[str, float]:
    """A function of means, such as F1 of counts or a sum over categories, and its interval.

    Args:
        strata: for each part of the data (n_i, ...) values of its n_i independent samples; each part is resampled on
            its own, so that its share in the whole stays.
        statistic: of the parts' means, each (R, ...), for R resamples at once: (R,).

    Returns:
        As `bootstrap_mean`: `mean` (the statistic of the data), `low`, `high`, and `n` (of all samples).
    """
    generator = np.random.default_rng(0)
    drawn = statistic([_resampled_means(part, generator) for part in strata])
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    (value,) = statistic([part.mean(axis=0, keepdims=True) for part in strata])
    return {"mean": float(value), "low": float(low), "high": float(high), "n": sum(map(len, strata))}


def _resampled_means(part: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means (RESAMPLES, ...) of as many samples with replacement of (n, ...) values."""
    count = max(1, DRAWN_AT_ONCE // len(part))
    sizes = [min(count, RESAMPLES - start) for start in range(0, RESAMPLES, count)]
    return np.concatenate([part[generator.integers(len(part), size=(size, len(part)))].mean(axis=1) for size in sizes])
