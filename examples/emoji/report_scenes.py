"""Scenes from words: compositions of two to four emoji that no training scene holds together.

Beside them what the decoders make of true features, and of teacher-forced ones, each written from the true features
before: where objects that are not there were lost.
"""

import torch
import torch.nn.functional as F
from datasets import Dataset
from judge import Judge, hits
from measuring import SHOWN, Bench, averages, decode, generators, numbered, per_sample, to_pil, to_pixels

from transformers_puma import flatten_scales
from transformers_puma.evaluation.teacher_forcing import teacher_forced_features

PART = "scenes"
TRUE = "true picture"


def crop(picture: torch.Tensor, box: list[int]) -> torch.Tensor:
    """The square around a box (x_min, y_min, x_max, y_max) of a picture (3, H, W), enlarged to the picture's size."""
    left, top, right, bottom = box
    side = max(right - left, bottom - top)
    left, top = max(0, (left + right - side) // 2), max(0, (top + bottom - side) // 2)
    part = picture[None, :, top : top + side, left : left + side]
    return F.interpolate(part, size=picture.shape[1:], mode="bilinear", antialias=True)[0]


def objects_found(judge: Judge, pictures: torch.Tensor, rows: list[dict]) -> dict[str, torch.Tensor]:
    """(B,) shares of a scene's objects whose concept the judge puts first, or among the first five, of all it knows,
    in the box where the true picture has the object."""
    crops = torch.stack(
        [crop(picture, box) for picture, row in zip(pictures, rows, strict=True) for box in row["boxes"]]
    )
    labels = torch.tensor([judge.classes["concept"].index(concept) for row in rows for concept in row["concepts"]])
    logits, counts = judge.look(crops).logits["concept"], [len(row["boxes"]) for row in rows]
    return {
        f"object_top{k}": torch.stack([found.mean() for found in hits(logits, labels, k).split(counts)])
        for k in (1, 5)
    }


def measure(bench: Bench, scenes: Dataset, samples: list[dict]) -> list[dict]:
    """How alike a drawn scene is to its caption and to the true picture, and which of its objects the judge finds."""
    chosen = scenes.select([sample["row"] for sample in samples])
    prompts, truth = list(chosen["prompt"]), to_pixels(list(chosen["target"]))
    objects = chosen.select_columns(["concepts", "boxes"]).to_list()
    pipe, true_features = bench.pipe, bench.pipe.encode_image(to_pil(truth))
    inputs = pipe.processor.prepare_generation(prompts, None).to(pipe.device)
    noise = pipe.mllm.draw_feature_noise(len(prompts), 0, generators(samples, 0), pipe.device)
    features = {
        "": pipe.generate_image_features(prompts, None, 0, generators(samples, 0)),
        "true features, ": true_features,
        "teacher-forced features, ": teacher_forced_features(
            pipe.mllm, **inputs, target_features=flatten_scales(true_features), noise=noise
        ),
    }
    shown = {TRUE: truth}
    for name, given in features.items():
        drawn = decode(pipe, given, pipe.scales, generators(samples, 0))
        shown |= {f"{name}scale {scale}": pictures for scale, pictures in drawn.items()}
    texts, true = bench.judge.read(prompts), bench.judge.look(truth).embeddings
    table = {}
    for label, pictures in shown.items():
        embeddings = bench.judge.look(pictures).embeddings
        table[label] = {
            "similarity_to_text": (embeddings * texts).sum(1),
            "similarity_to_picture": (embeddings * true).sum(1),
            **objects_found(bench.judge, pictures, objects),
        }
    for i, sample in enumerate(samples):
        bench.keep(PART, sample, **{label: pictures[i] for label, pictures in shown.items()})
    return per_sample(table)


def run(bench: Bench, rows: Dataset, count: int) -> dict:
    known = set(bench.judge.classes["concept"])
    scenes = [
        row
        for row, (type, concepts) in enumerate(zip(rows["type"], rows["concepts"], strict=True))
        if type == "scene" and known.issuperset(concepts)
    ]
    samples = numbered([{"row": row} for row in scenes[:count]])
    measured = bench.run(PART, samples, lambda batch: measure(bench, rows, batch))
    return {
        "samples": len(measured),
        "table": averages(measured),
        "chance": {f"object_top{k}": k / len(known) for k in (1, 5)},
        "prompts": list(rows.select(scenes[:SHOWN])["prompt"]),
    }


def sheet(bench: Bench, result: dict):
    labels = {TRUE: TRUE} | {f"scale {s}": f"scale {s}" for s in sorted(bench.pipe.scales, reverse=True)}
    return bench.sheet(PART, labels, result["prompts"], result["samples"])
