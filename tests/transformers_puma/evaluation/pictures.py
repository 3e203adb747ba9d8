"""Files of tiny benchmarks."""

import json
from pathlib import Path

from tests.transformers_puma.conftest import make_picture


def write_picture(file: Path, seed: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    make_picture(seed).save(file)
    return file


def write_json_file(file: Path, content) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def judged(benchmark, answers: dict) -> list[dict]:
    """Rows of a run in which each question, by its id, got this answer."""
    return [
        {"id": question.id, "answer": answers[question.id], **benchmark.judge(question, answers[question.id])}
        for question in benchmark.questions
    ]


def means(scores: dict) -> dict:
    return {row: {metric: score["mean"] for metric, score in metrics.items()} for row, metrics in scores.items()}
