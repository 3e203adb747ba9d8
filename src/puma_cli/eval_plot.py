"""Plots of results, among them the granularity curve: what each scale of a model trades of control for diversity.

Imports matplotlib.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from puma_files import whole_file

from .errors import UserError
from .eval_report import REPORT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# For each evaluation the axes of its curve, (metric, label) of diversity (or change) and of control; where a run lacks
# the first pair's numbers, the next one's.
CURVES = {
    "reconstruction": [
        (("lpips_d", "diversity: LPIPS between seeds"), ("psnr_r", "control: PSNR to the original (dB)")),
    ],
    "generation": [
        (("lpips_d", "diversity: LPIPS between seeds"), ("clip_t", "control: CLIP-T")),
        (("lpips_d", "diversity: LPIPS between seeds"), ("lpips_t", "control: LPIPS to the true picture")),
    ],
    "editing": [
        (("clip_i", "kept: CLIP-I to the source"), ("clip_t", "done: CLIP-T of the target's caption")),
        (("lpips_s", "changed: LPIPS to the source"), ("lpips_t", "done: LPIPS to the true target")),
    ],
}
STAGES = {"psnr_truth": "from true features", "psnr_forced": "teacher-forced", "psnr_free": "generated freely"}
UNCHANGED = "unchanged"


def plot_results(results: list[dict[str, Any]], output: Path) -> None:
    """Draws results of one evaluation into a PNG, with the report's where it has these numbers.

    Raises:
        UserError: results without the numbers that are drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UserError("--plot needs matplotlib: pip install 'puma-hub[eval]'") from error
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    task, axes = results[0]["task"], figure.add_subplot()
    names = [f"{chr(ord('A') + index)}: {result['settings']['model']}" for index, result in enumerate(results)]
    named = dict(zip(names, (result["scores"] for result in results), strict=True))
    if task in CURVES:
        _draw_curves(axes, task, named)
    elif task == "features":
        _draw_stages(axes, named)
    elif task == "understanding":
        _draw_bars(axes, named)
    else:
        raise UserError(f"--plot draws no results of {task}")
    axes.legend(fontsize="small")
    with whole_file(output) as unfinished:
        figure.savefig(unfinished, format="png", dpi=150)


def _draw_curves(axes: "Axes", task: str, named: dict[str, dict]) -> None:
    """One metric against another, a point for each scale."""
    (x, x_label), (y, y_label) = _shared_pair(task, named)
    curves = {name: _points(scores, [x, y], "mean") for name, scores in named.items()}
    reported = _points(REPORT[task], [x, y], None)
    if len(reported) > 1:
        curves["PUMA (report)"] = reported
    for label, points in curves.items():
        style = "--" if label == "PUMA (report)" else "-"
        axes.plot([x for x, _ in points.values()], [y for _, y in points.values()], f"o{style}", label=label)
        for scale, point in points.items():
            axes.annotate(f"$f_{scale}$", point, xytext=(4, 4), textcoords="offset points")
    source = next(iter(named.values())).get(UNCHANGED, {})
    if {x, y} <= source.keys():
        axes.plot(source[x]["mean"], source[y]["mean"], "k*", label="the source, unchanged")
    axes.set(xlabel=x_label, ylabel=y_label)
    if y.startswith("lpips"):
        axes.invert_yaxis()  # up is better


def _shared_pair(task: str, named: dict[str, dict]) -> tuple[tuple[str, str], tuple[str, str]]:
    """The first axes of which all results have numbers."""
    for pair in CURVES[task]:
        if all(_points(scores, [metric for metric, _ in pair], "mean") for scores in named.values()):
            return pair
    wanted = " or of ".join(" and ".join(metric for metric, _ in pair) for pair in CURVES[task])
    raise UserError(f"--plot draws {task} with numbers of {wanted}, which not all of these results have")


def _points(scores: dict[str, dict[str, Any]], names: list[str], field: str | None) -> dict[str, tuple[float, float]]:
    """Scale -> (x, y), for the scales that have both numbers."""
    found = {}
    for scale in sorted(filter(str.isdigit, scores)):
        values = [scores[scale].get(name) for name in names]
        if None not in values:
            found[scale] = tuple(value[field] if field else value for value in values)
    return found


def _draw_stages(axes: "Axes", named: dict[str, dict]) -> None:
    """PSNR over the scales, a line for each stage; what is between two lines is lost there."""
    for index, (name, scores) in enumerate(named.items()):
        scales, style = sorted(filter(str.isdigit, scores)), ("-", "--", ":", "-.")[index % 4]
        axes.axhline(scores["vae"]["psnr"]["mean"], color="gray", linestyle=style, label=f"{name[0]}, VAE alone")
        for color, (metric, stage) in enumerate(STAGES.items()):
            means = [scores[scale][metric]["mean"] for scale in scales]
            ticks = [f"$f_{scale}$" for scale in scales]
            axes.plot(ticks, means, f"oC{color}{style}", label=f"{name[0]}, {stage}")
    axes.set(xlabel="scale", ylabel="PSNR to the true picture (dB)", title="; ".join(named))


def _draw_bars(axes: "Axes", named: dict[str, dict]) -> None:
    """The first metric of each row with its interval, and beside it what needs no picture, or the report's."""
    rows = list(dict.fromkeys(row for scores in named.values() for row, metrics in scores.items() if metrics))
    if not rows:
        raise UserError("--plot: these results have no scores (the answers are hidden)")
    height = 0.8 / len(named)
    for index, (name, scores) in enumerate(named.items()):
        places = [(place, next(iter(scores[row].values()))) for place, row in enumerate(rows) if scores.get(row)]
        at, values = [place + index * height for place, _ in places], [value["mean"] for _, value in places]
        errors = [[v["mean"] - v["low"] for _, v in places], [v["high"] - v["mean"] for _, v in places]]
        axes.barh(at, values, height, xerr=errors, label=name)
    first = next(iter(named.values()))
    frequent = {row: metrics["majority"]["mean"] for row, metrics in first.items() if "majority" in metrics}
    reported = {row: value for row, metrics in REPORT["understanding"].items() for value in metrics.values()}
    _mark(axes, rows, frequent, "k|", "always the most frequent answer")
    _mark(axes, rows, reported, "k*", "PUMA (report)")
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(rows))], rows)
    axes.invert_yaxis()
    axes.set(xlabel="score")


def _mark(axes: "Axes", rows: list[str], values: dict[str, float], style: str, label: str) -> None:
    points = [(values[row], place) for place, row in enumerate(rows) if row in values]
    if points:
        axes.plot([x for x, _ in points], [y for _, y in points], style, markersize=12, label=label)
