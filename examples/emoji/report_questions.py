"""The report's table 4 in small: questions about held-out pictures by type, against the most frequent answer."""

from collections import Counter

import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from measuring import SHOWN, Bench, averages, numbered, to_pixels
from report_edits import in_turn

from transformers_puma.boxes_puma import BOX_MARK

PART = "questions"
MAX_NEW_TOKENS = 24
HIT = 0.5  # intersection over union from which a box counts as found
Box = tuple[float, float, float, float]


def overlap(first: Box, second: Box) -> float:
    """Intersection over union of two boxes (x_min, y_min, x_max, y_max)."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0) * max(height, 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return shared / (areas - shared)


def answers(bench: Bench, rows: Dataset) -> list[str]:
    """What the model says, greedily. A box of the true answer is no part of the question."""
    pipe = bench.pipe
    boxes = [[row["box"]] if BOX_MARK in row["question"] else None for row in rows.remove_columns("image")]
    inputs = pipe.processor.prepare_question(list(rows["question"]), [[image] for image in rows["image"]], boxes)
    sequences = pipe.mllm.generate(**inputs.to(pipe.device), max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return pipe.processor.decode_answers(sequences, inputs["input_ids"].shape[1])


def is_right(bench: Bench, answer: str, row: dict, size: tuple[int, int]) -> bool:
    """The true words, or a box that overlaps the true one by half."""
    if row["answer"] != BOX_MARK:
        return answer == row["answer"]
    found = bench.pipe.processor.parse_boxes(answer, size)
    return bool(found) and overlap(found[0], row["box"]) >= HIT


def measure(bench: Bench, rows: Dataset, samples: list[dict]) -> list[dict]:
    chosen = rows.select([sample["row"] for sample in samples])
    said = answers(bench, chosen)
    images, described = list(chosen["image"]), chosen.remove_columns("image").to_list()
    for sample, image in zip(samples, images, strict=True):
        bench.keep(PART, sample, image=to_pixels([image])[0])
    return [
        {"type": row["question_type"], "answer": answer, "scores": {"model": {"right": float(right)}}}
        for row, answer, right in zip(
            described,
            said,
            (
                is_right(bench, answer, row, image.size)
                for answer, row, image in zip(said, described, images, strict=True)
            ),
            strict=True,
        )
    ]


def most_frequent(rows: list[dict]) -> float:
    """Share that the best constant answer gets: for words the most frequent, for boxes the middle one."""
    if rows[0]["answer"] != BOX_MARK:
        return Counter(row["answer"] for row in rows).most_common(1)[0][1] / len(rows)
    boxes = torch.tensor([row["box"] for row in rows]).float()
    middle = boxes.median(dim=0).values.tolist()
    return sum(overlap(middle, box) >= HIT for box in boxes.tolist()) / len(rows)


def run(bench: Bench, tasks: DatasetDict, per_type: int) -> dict:
    """`tasks`: of emoji_evaluation.py; `box` is None for a question without one."""
    # All questions about pairs come first; kept in memory, for a cache would be another file of the tasks.
    rows = concatenate_datasets([tasks["questions"], tasks["boxes"]]).shuffle(seed=0, keep_in_memory=True)
    samples = numbered([{"row": row} for row in in_turn(list(rows["question_type"]), per_type)])
    measured = bench.run(PART, samples, lambda batch: measure(bench, rows, batch))
    asked = rows.select([sample["row"] for sample in samples]).remove_columns("image").to_list()
    types = {}
    for type in dict.fromkeys(row["question_type"] for row in asked):
        own = [row for row in measured if row["type"] == type]
        types[type] = averages(own)["model"]["right"] | {
            "most frequent answer": most_frequent([row for row in asked if row["question_type"] == type])
        }
    examples = [
        f"{row['question']} - {said['answer']} ({row['answer']})"
        for row, said in zip(asked[:SHOWN], measured[:SHOWN], strict=True)
    ]
    return {"samples": len(measured), "types": types, "examples": examples}


def sheet(bench: Bench, result: dict):
    return bench.sheet(PART, {"image": ""}, result["examples"], result["samples"])
