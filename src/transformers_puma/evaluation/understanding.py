"""Asks a language model the questions of a benchmark of understanding (the report's Tables 4 and 5)."""

import importlib
from collections.abc import Callable
from pathlib import Path

import torch

from ..configuration_puma import PumaConfig
from ..modeling_puma import PumaForConditionalGeneration
from ..processing_puma import PumaProcessor
from .questions import Benchmark, Question
from .runner import Row, Shard, model_settings, run_samples, write_results

# Modules are imported when they are needed: MMBench writes workbooks with openpyxl, tables are read with datasets.
BENCHMARKS = {
    "mmbench": ("mmbench", "MMBench"),
    "mme": ("mme", "MME"),
    "gqa": ("gqa", "GQA"),
    "vqav2": ("vqav2", "VQAv2"),
    "pope": ("pope", "POPE"),
    "vizwiz": ("vizwiz", "VizWiz"),
    "questions": ("question_table", "QuestionTable"),
}
TASK = "understanding"
MAX_NEW_TOKENS = 128  # of LLaVA's `model_vqa_loader.py`


def find_benchmark(name: str) -> type[Benchmark]:
    """Raises `ValueError` for a name that is not in `BENCHMARKS`, `ModuleNotFoundError` for a missing package."""
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark={name!r} must be one of {', '.join(BENCHMARKS)}")
    module, cls = BENCHMARKS[name]
    return getattr(importlib.import_module(f".{module}", __package__), cls)


def evaluate_understanding(
    model: PumaForConditionalGeneration,
    processor: PumaProcessor,
    benchmark: Benchmark,
    folder: str | Path,
    *,
    model_name: str,
    batch_size: int = 8,
    max_new_tokens: int = MAX_NEW_TOKENS,
    shard: Shard | None = None,
) -> Path | None:
    """Asks all questions with greedy decoding, left-padded in batches; see the runner for shards and resuming.

    Args:
        folder: of the run: a row for each question, `results.json`, and the submission file if the benchmark has one.
        model_name: what the results say the model is; of a folder, its weights count as a setting too.

    Returns:
        `results.json`; None if other processes are still at work.

    Raises:
        ValueError: a folder that holds another run.
    """
    settings = {
        "benchmark": benchmark.name,
        **model_settings(model_name),
        "data": str(benchmark.data),
        "split": benchmark.split,
        "questions": benchmark.fingerprint,
        "input_scales": scales_read(model.config),
        "decoding": "greedy",  # so there is no seed
        "max_new_tokens": max_new_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    ask = make_asker(model, processor, benchmark, max_new_tokens)
    rows = run_samples(
        benchmark.questions,
        ask,
        folder,
        settings=settings,
        batch_size=batch_size,
        description=benchmark.name,
        shard=shard,
    )
    if rows is None:
        return None
    submission = benchmark.write_submission(rows, Path(folder))
    more = {"headline": benchmark.headline, "submission": submission and submission.name}
    scores = benchmark.scores(rows)
    return write_results(folder, task=TASK, scores=scores, settings=settings, num_samples=len(rows), **more)


def make_asker(
    model: PumaForConditionalGeneration, processor: PumaProcessor, benchmark: Benchmark, max_new_tokens: int
) -> Callable[[list[Question]], list[Row]]:
    def ask(questions: list[Question]) -> list[Row]:
        pictures = [[question.open_picture()] for question in questions]
        inputs = processor.prepare_question([question.prompt for question in questions], pictures).to(model.device)
        with torch.no_grad():
            sequences = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
        answers = processor.decode_answers(sequences, inputs["input_ids"].shape[1])
        return [
            {"id": question.id, "answer": answer, **benchmark.judge(question, answer)}
            for question, answer in zip(questions, answers, strict=True)
        ]

    return ask


def scales_read(config: PumaConfig) -> list[int]:
    """The scales of a picture that a model reads: all, or its `input_scales` (report table 5)."""
    return list(range(config.num_scales)) if config.input_scales is None else sorted(config.input_scales)
