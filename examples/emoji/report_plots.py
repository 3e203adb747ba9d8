"""Plots of the report's results as PNG files."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

WIDTH, HEIGHT, DPI = 4.2, 3.2, 120  # of one panel in inches


def scales_of(table: dict) -> list[int]:
    """Coarsest first, as everywhere in the plots."""
    return sorted((int(label.split()[1]) for label in table if label.startswith("scale ")), reverse=True)


def line(axis, table: dict, metric: str, label: str, **style) -> None:
    """A metric over the scales, with its interval."""
    scales = scales_of(table)
    scores = [table[f"scale {scale}"][metric] for scale in scales]
    means = [score["mean"] for score in scores]
    margins = [[s["mean"] - s["low"] for s in scores], [s["high"] - s["mean"] for s in scores]]
    axis.errorbar([str(scale) for scale in scales], means, margins, marker="o", capsize=3, label=label, **style)


def level(axis, score: dict, label: str, colour: str) -> None:
    axis.axhline(score["mean"], color=colour, linestyle="--", linewidth=1, label=label)


def panels(titles: list[str]):
    figure, axes = plt.subplots(1, len(titles), figsize=(WIDTH * len(titles), HEIGHT), squeeze=False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set(title=title, xlabel="scale (4: one token, 0: 256 tokens)")
        axis.grid(alpha=0.3)
    return figure, axes[0]


def reconstruction(results: dict):
    table = results["reconstruction"]["table"]
    figure, axes = panels(["PSNR (dB)", "LPIPS"])
    for axis, metric in zip(axes, ("psnr", "lpips"), strict=True):
        line(axis, table, f"{metric}_r", "against the original")
        line(axis, table, f"{metric}_d", "between two seeds")
        for row, colour in (("VAE round trip", "black"), ("nearest training picture", "grey")):
            if row in table:
                level(axis, table[row][f"{metric}_r"], row, colour)
        axis.legend(fontsize=7)
    return figure


def text_to_image(results: dict):
    table, chance = results["text_to_image"]["table"], results["text_to_image"]["chance"]
    figure, axes = panels(["the judge's classes", "the judge's similarity", "LPIPS between two seeds"])
    for metric, label, colour in (
        ("concept_top1", "concept, top 1", "C0"),
        ("concept_top5", "concept, top 5", "C1"),
        ("style", "style", "C2"),
    ):
        line(axes[0], table, metric, label, color=colour)
        level(axes[0], table["true picture"][metric], "", colour)
        axes[0].axhline(chance[metric], color=colour, linestyle=":", linewidth=1)
    for metric, label, colour in (
        ("similarity_to_text", "to the text", "C0"),
        ("similarity_to_picture", "to the true picture", "C1"),
    ):
        line(axes[1], table, metric, label, color=colour)
        axes[1].axhline(table["true picture"]["similarity_to_text"]["mean"], color="C0", linestyle="--", linewidth=1)
    line(axes[2], table, "lpips_d", "")
    axes[0].set_xlabel("scale (dashed: real pictures, dotted: chance)")
    axes[0].legend(fontsize=7)
    axes[1].legend(fontsize=7)
    return figure


def drift(results: dict):
    features = results["features"]
    figure, axes = panels(["feature error / variance", "similarity to the true picture", "concept, top 5"])
    for label, by_scale in features["error over variance"].items():
        scales = sorted(by_scale, key=int, reverse=True)
        axes[0].plot([str(scale) for scale in scales], [by_scale[scale] for scale in scales], marker="o", label=label)
    for name in ("true", "teacher-forced", "free-running"):
        prefix = f"{name} features, "
        table = {
            label.removeprefix(prefix): s for label, s in features["pictures"].items() if label.startswith(prefix)
        }
        line(axes[1], table, "similarity_to_picture", f"{name} features")
        line(axes[2], table, "concept_top5", f"{name} features")
    for axis in axes:
        axis.legend(fontsize=7)
    return figure


def questions(results: dict):
    types = results["questions"]["types"]
    figure, axis = plt.subplots(figsize=(8, 4))
    places = range(len(types))
    means = [score["mean"] for score in types.values()]
    margins = [[s["mean"] - s["low"] for s in types.values()], [s["high"] - s["mean"] for s in types.values()]]
    axis.bar([place - 0.2 for place in places], means, 0.4, yerr=margins, capsize=3, label="model")
    baseline = [score["most frequent answer"] for score in types.values()]
    axis.bar([place + 0.2 for place in places], baseline, 0.4, label="most frequent answer", color="lightgrey")
    axis.set_xticks(list(places), list(types), rotation=30, ha="right")
    axis.set(ylabel="share of right answers", ylim=(0, 1))
    axis.legend()
    return figure


PLOTS = {"reconstruction": reconstruction, "text_to_image": text_to_image, "features": drift, "questions": questions}


def write_plots(results: dict, out: Path) -> dict[str, str]:
    """Part -> file name of its plot."""
    files = {}
    for part, draw in PLOTS.items():
        if part in results:
            figure = draw(results)
            figure.tight_layout()
            files[part] = f"plot_{part}.png"
            figure.savefig(out / files[part], dpi=DPI)
            plt.close(figure)
    return files
