"""One evaluation from samples to a results file: the runner, and what an evaluation of pictures adds to it."""

from pathlib import Path
from typing import Any, Protocol

from transformers_puma.evaluation.runner import Row, model_settings, run_samples, write_results

from .data import Samples


class Evaluation(Protocol):
    """What `evaluate` runs.

    task: its name in the results.
    """

    task: str

    def settings(self) -> dict[str, Any]:
        """All that decides the numbers, apart from model and data."""

    def __call__(self, samples: list[dict[str, Any]]) -> list[Row]:
        """A batch of samples -> their rows."""

    def scores(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        """All rows -> `{row of the table: {metric: score}}`, see `write_results`."""


def evaluate(
    evaluation: Evaluation, samples: Samples, folder: str | Path, *, model: str, batch_size: int = 8
) -> Path | None:
    """Runs what `folder` lacks of an evaluation and writes `results.json` there.

    Args:
        model: its name, for the results; of a folder, its weights count as a setting too.

    Returns:
        The results file; None if other processes are still at work, one of which will write it.
    """
    settings = {"task": evaluation.task, **model_settings(model), **samples.source, **evaluation.settings()}
    rows = run_samples(
        samples, evaluation, folder, settings=settings, batch_size=batch_size, description=evaluation.task
    )
    if rows is None:
        return None
    return write_results(
        folder, task=evaluation.task, scores=evaluation.scores(rows), settings=settings, num_samples=len(rows)
    )
