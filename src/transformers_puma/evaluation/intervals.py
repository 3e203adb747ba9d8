"""Intervals of scores that are no plain mean over samples."""

from collections.abc import Callable, Sequence

import numpy as np

from .runner import RESAMPLES


def bootstrap_statistic(
    strata: Sequence[np.ndarray],
    statistic: Callable[[list[np.ndarray]], float],
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, float]:
    """A function of means, such as F1 of counts or a sum over categories, and its percentile bootstrap interval.

    Args:
        strata: for each part of the data (n_i, k) values of its n_i independent samples; each part is resampled on
            its own, so that its share in the whole stays.
        statistic: of the parts' means, each (k,).

    Returns:
        As `bootstrap_mean`: `mean` (the statistic of the data), `low`, `high`, and `n` (of all samples).
    """
    generator = np.random.default_rng(seed)
    drawn = [
        statistic([part[generator.integers(len(part), size=len(part))].mean(axis=0) for part in strata])
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    value = statistic([part.mean(axis=0) for part in strata])
    return {"mean": float(value), "low": float(low), "high": float(high), "n": sum(map(len, strata))}
