import numpy as np
import pytest

from transformers_puma.evaluation import intervals
from transformers_puma.evaluation.intervals import bootstrap_mean, bootstrap_statistic


def test_bootstrap_interval_of_a_mean():
    values = np.random.default_rng(1).normal(5, 2, size=400)
    score = bootstrap_mean(values)
    assert score["mean"] == pytest.approx(values.mean()) and score["n"] == 400
    # The normal approximation, 1.96 standard errors, is good for 400 samples.
    half = 1.96 * values.std() / 20
    assert score["low"] == pytest.approx(values.mean() - half, abs=0.05)
    assert score["high"] == pytest.approx(values.mean() + half, abs=0.05)
    assert bootstrap_mean([3.0, 3.0]) == {"mean": 3.0, "low": 3.0, "high": 3.0, "n": 2}
    assert bootstrap_mean(values) == score


def test_each_part_is_resampled_on_its_own():
    """Constant parts of different sizes have no spread, however they are combined."""
    parts = [np.full((3, 2), 2.0), np.full((50, 2), 5.0)]
    result = bootstrap_statistic(parts, lambda means: means[0][:, 0] * means[1][:, 1])
    assert result == {"mean": 10, "low": 10, "high": 10, "n": 53}


def test_drawing_in_pieces_changes_nothing(monkeypatch):
    values = np.random.default_rng(1).normal(size=(30, 1))
    whole = bootstrap_statistic([values], lambda means: means[0][:, 0])
    monkeypatch.setattr(intervals, "DRAWN_AT_ONCE", 200)
    assert bootstrap_statistic([values], lambda means: means[0][:, 0]) == whole
