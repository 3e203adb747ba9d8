"""Scenes from words: compositions of two to four emoji that no training scene holds together."""

import torch
from datasets import Dataset
from measuring import SHOWN, Bench, averages, decode, generators, numbered, per_sample, to_pixels

PART = "scenes"
TRUE = "true picture"


def measure(bench: Bench, rows: Dataset, captions: list[str], samples: list[dict]) -> list[dict]:
    """How alike a drawn scene is to its caption and to the true picture, and whether the judge finds its caption
    first among `captions`."""
    chosen = rows.select([sample["row"] for sample in samples])
    prompts, truth = list(chosen["prompt"]), to_pixels(list(chosen["target"]))
    features = bench.pipe.generate_image_features(prompts, None, 0, generators(samples, 0))
    drawn = decode(bench.pipe, features, bench.pipe.scales, generators(samples, 0))
    shown = {TRUE: truth} | {f"scale {scale}": pictures for scale, pictures in drawn.items()}
    texts, own = bench.judge.read(captions), torch.tensor([captions.index(prompt) for prompt in prompts])
    true = bench.judge.look(truth).embeddings
    table = {}
    for label, pictures in shown.items():
        embeddings = bench.judge.look(pictures).embeddings
        cosines = embeddings @ texts.T
        table[label] = {
            "similarity_to_text": cosines[torch.arange(len(own)), own],
            "similarity_to_picture": (embeddings * true).sum(1),
            "caption_found": (cosines.argmax(1) == own).float(),
        }
    for i, sample in enumerate(samples):
        bench.keep(PART, sample, **{label: pictures[i] for label, pictures in shown.items()})
    return per_sample(table)


def run(bench: Bench, rows: Dataset, count: int) -> dict:
    scenes = [row for row, type in enumerate(rows["type"]) if type == "scene"]
    captions = list(dict.fromkeys(rows.select(scenes)["prompt"]))
    samples = numbered([{"row": row} for row in scenes[:count]])
    measured = bench.run(PART, samples, lambda batch: measure(bench, rows, captions, batch))
    return {
        "samples": len(measured),
        "table": averages(measured),
        "captions": len(captions),
        "chance": {"caption_found": 1 / len(captions)},
        "prompts": list(rows.select(scenes[:SHOWN])["prompt"]),
    }


def sheet(bench: Bench, result: dict):
    labels = {TRUE: TRUE} | {f"scale {s}": f"scale {s}" for s in sorted(bench.pipe.scales, reverse=True)}
    return bench.sheet(PART, labels, result["prompts"], result["samples"])
