"""The granularity curve: what each scale of a model trades of control for diversity. Imports matplotlib."""

import os
from pathlib import Path
from typing import Any

from .errors import UserError
from .eval_report import REPORT

# For each evaluation: the axis of diversity, and of control.
AXES = {
    "reconstruction": (("lpips_d", "LPIPS between seeds"), ("psnr_r", "PSNR to the original (dB)")),
    "generation": (("lpips_d", "LPIPS between seeds"), ("clip_t", "CLIP-T")),
}


def plot_granularity(results: list[dict[str, Any]], output: Path) -> None:
    """Draws a curve for each result, and the report's where it has these numbers, over the scales.

    Raises:
        UserError: an evaluation without such a curve, or results without its numbers.
    """
    task = results[0]["task"]
    if task not in AXES:
        raise UserError(f"--plot draws results of {' or '.join(AXES)}, not of {task}")
    names = [metric for metric, _ in AXES[task]]
    curves = {}
    for index, result in enumerate(results):
        label = f"{chr(ord('A') + index)}: {result['settings']['model']}"
        curves[label] = _points(result["scores"], names, "mean")
    without = [label for label, points in curves.items() if not points]
    if without:
        raise UserError(f"--plot needs {' and '.join(names)}, and the results of {without[0]} lack one")
    reported = _points(REPORT[task], names, None)
    if len(reported) > 1:
        curves["PUMA (report)"] = reported

    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UserError("--plot needs matplotlib: pip install 'puma-hub[eval]'") from error
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel=f"diversity: {AXES[task][0][1]}", ylabel=f"control: {AXES[task][1][1]}")
    for label, points in curves.items():
        style = "--" if label == "PUMA (report)" else "-"
        axes.plot([x for x, _ in points.values()], [y for _, y in points.values()], f"o{style}", label=label)
        for scale, point in points.items():
            axes.annotate(f"$f_{scale}$", point, xytext=(4, 4), textcoords="offset points")
    axes.legend()
    unfinished = output.with_name(f".{output.name}.{os.getpid()}")
    figure.savefig(unfinished, format="png", dpi=150)
    os.replace(unfinished, output)


def _points(scores: dict[str, dict[str, Any]], names: list[str], field: str | None) -> dict[str, tuple[float, float]]:
    """Scale -> (x, y), for the scales that have both numbers."""
    found = {}
    for scale in sorted(filter(str.isdigit, scores)):
        values = [scores[scale].get(name) for name in names]
        if None not in values:
            found[scale] = tuple(value[field] if field else value for value in values)
    return found
