"""The report's table 3 in small: edits and conditional generation of concepts that no training saw.

Which scale keeps the source: where the true result equals the source, the drawn one should too.
"""

import math

import torch
from datasets import Dataset
from emoji_training import psnr_where
from judge import HEADS
from measuring import (
    SHOWN,
    Bench,
    Scores,
    averages,
    decode,
    generators,
    is_drawn,
    lpips_where,
    numbered,
    per_sample,
    to_pixels,
)

SCALES = (1, 0)
SAME = 0.02  # largest difference of a channel where source and true result count as equal
LEAST_KEPT = 0.05  # of the source's drawing must stay, else there is nothing to keep


def kept(bench: Bench, drawn: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> Scores:
    """How well what should stay has stayed; NaN for a picture of which nearly nothing should."""
    mask = is_drawn(source) & ((source - target).abs().amax(1, keepdim=True) <= SAME)
    share = mask.flatten(1).sum(1) / is_drawn(source).flatten(1).sum(1).clamp_min(1)
    scores = {"psnr_kept": psnr_where(drawn, source, mask), "lpips_kept": lpips_where(bench, drawn, source, mask)}
    return {name: values.masked_fill(share < LEAST_KEPT, math.nan) for name, values in scores.items()}


def agreement(
    bench: Bench, drawn: torch.Tensor, source: torch.Tensor, target: torch.Tensor, types: list[str]
) -> Scores:
    """What the judge sees: likeness to the true result, and whether the change that was asked for is there."""
    look, before, after = (bench.judge.look(pictures) for pictures in (drawn, source, target))
    to_target = (look.embeddings * after.embeddings).sum(1)
    scores = {
        "similarity_to_target": to_target,
        "nearer_to_target": (to_target > (look.embeddings * before.embeddings).sum(1)).float(),
        "changed_as_asked": torch.full((len(drawn),), math.nan),
    }
    for i, type in enumerate(types):
        if type in HEADS:
            scores["changed_as_asked"][i] = float(look.logits[type][i].argmax() == after.logits[type][i].argmax())
    return scores


def measure(bench: Bench, part: str, rows: Dataset, samples: list[dict]) -> list[dict]:
    chosen = rows.select([sample["row"] for sample in samples])
    images, prompts, types = chosen["image"], chosen["prompt"], chosen["type"]
    source, target = to_pixels(list(images)), to_pixels(list(chosen["target"]))
    features = bench.pipe.generate_image_features(
        list(prompts), [[image] for image in images], min(SCALES), generators(samples, 0)
    )
    drawn = decode(bench.pipe, features, SCALES, generators(samples, 0))
    shown = {"source": source} | {f"scale {scale}": pictures for scale, pictures in drawn.items()}
    table = {
        label: kept(bench, pictures, source, target) | agreement(bench, pictures, source, target, list(types))
        for label, pictures in shown.items()
    }
    # The source is itself: what it scores against the true result is what doing nothing scores.
    table["source"] = {name: values for name, values in table["source"].items() if name == "similarity_to_target"}
    for i, sample in enumerate(samples):
        bench.keep(part, sample, target=target[i], **{label: pictures[i] for label, pictures in shown.items()})
    return [row | {"type": type} for row, type in zip(per_sample(table), types, strict=True)]


def in_turn(types: list[str], per_type: int) -> list[int]:
    """Rows of each type in turn, at most `per_type` of each, so that the first show all types; a larger count only
    adds at the end."""
    seen: dict[str, int] = {}
    places = []
    for row, type in enumerate(types):
        seen[type] = seen.get(type, 0) + 1
        places.append((seen[type], row))
    return [row for turn, row in sorted(places) if turn <= per_type]


def run(bench: Bench, part: str, rows: Dataset, per_type: int) -> dict:
    samples = numbered([{"row": row} for row in in_turn(list(rows["type"]), per_type)])
    measured = bench.run(part, samples, lambda batch: measure(bench, part, rows, batch))
    by_type = {
        type: averages([row for row in measured if row["type"] == type]) for type in dict.fromkeys(rows["type"])
    }
    return {
        "samples": len(measured),
        "table": averages(measured),
        "types": by_type,
        "prompts": [rows[sample["row"]]["prompt"] for sample in samples[:SHOWN]],
    }


def sheet(bench: Bench, part: str, result: dict):
    labels = {"source": "input"} | {f"scale {scale}": f"scale {scale}" for scale in SCALES} | {"target": "truth"}
    return bench.sheet(part, labels, result["prompts"], result["samples"])
