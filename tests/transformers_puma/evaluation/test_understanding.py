"""Real runs of a tiny model over tables of questions."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature

from transformers_puma.evaluation.question_table import QuestionTable
from transformers_puma.evaluation.questions import Question
from transformers_puma.evaluation.runner import Shard, weights_fingerprint
from transformers_puma.evaluation.understanding import BENCHMARKS, evaluate_understanding, find_benchmark, scales_read

from ..conftest import make_config, make_model
from .pictures import write_picture


@pytest.fixture(scope="module")
def model(processor):
    """A model whose answers depend on what it reads."""
    model = make_model(processor)
    for name, weight in model.model.language_model.named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.fixture
def table(tmp_path) -> QuestionTable:
    """Six questions of different lengths about six pictures."""
    rows = []
    for i in range(6):
        write_picture(tmp_path / f"data/{i}.png", seed=i)
        rows.append({"image": f"{i}.png", "question": "What is it" + "?" * i, "answer": "noto", "question_type": "x"})
    (tmp_path / "data/test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return QuestionTable(tmp_path / "data")


def run(model, processor, table, folder, **options):
    return evaluate_understanding(model, processor, table, folder, model_name="tiny", max_new_tokens=4, **options)


def read(file):
    rows = [line for part in sorted(file.parent.glob("samples-*")) for line in part.read_text().splitlines()]
    return json.loads(file.read_text()), sorted(map(json.loads, rows), key=lambda row: row["index"])


def test_answers_are_those_of_single_greedy_questions(model, processor, table, tmp_path):
    results, rows = read(run(model, processor, table, tmp_path / "run", batch_size=4))
    assert results["task"] == "understanding" and results["num_samples"] == 6
    assert results["scores"].keys() == {"questions", "questions: x"}
    assert results["settings"]["input_scales"] == [0, 1, 2] and results["headline"] == "accuracy"
    for row, question in zip(rows, table.questions, strict=True):
        inputs = processor.prepare_question([question.prompt], [[question.open_picture()]])
        with torch.no_grad():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=4)
        assert row["answer"] == processor.decode_answers(ids, inputs["input_ids"].shape[1])[0]
        assert row["id"] == question.id
    assert len({row["answer"] for row in rows}) > 1  # the pictures and questions matter


def test_two_processes_and_a_kill_change_nothing(model, processor, table, tmp_path):
    whole = read(run(model, processor, table, tmp_path / "whole", batch_size=6))
    folder = tmp_path / "parts"
    assert run(model, processor, table, folder, shard=Shard(0, 2)) is None
    part = folder / "samples-00000.jsonl"
    part.write_text(part.read_text()[:-20])  # killed while it wrote its last row
    assert run(model, processor, table, folder, shard=Shard(1, 2)) is None
    results, rows = read(run(model, processor, table, folder, shard=Shard(0, 2)))
    assert (results, rows) == whole


def test_another_model_does_not_go_into_the_same_folder(model, processor, table, tmp_path):
    run(model, processor, table, tmp_path / "run")
    with pytest.raises(ValueError, match="model = 'tiny', and this one has 'other'"):
        evaluate_understanding(model, processor, table, tmp_path / "run", model_name="other", max_new_tokens=4)


def test_a_run_knows_the_weights_it_is_of(model, processor, table, tmp_path):
    model.save_pretrained(tmp_path / "model")
    options = {"model_name": str(tmp_path / "model"), "max_new_tokens": 1}
    file = evaluate_understanding(model, processor, table, tmp_path / "run", **options)
    assert json.loads(file.read_text())["settings"]["weights"] == weights_fingerprint(tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))  # trained on
    with pytest.raises(ValueError, match="holds a run with weights"):
        evaluate_understanding(model, processor, table, tmp_path / "run", **options)


def test_other_questions_do_not_go_into_the_same_folder(model, processor, table, tmp_path):
    run(model, processor, table, tmp_path / "run")
    file = tmp_path / "data/test.jsonl"
    file.write_text(file.read_text().replace("noto", "blob"))
    with pytest.raises(ValueError, match="holds a run with questions = "):
        run(model, processor, QuestionTable(table.data), tmp_path / "run")


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_a_picture_that_cannot_be_read_is_named(tmp_path, content):
    rows = {"image": [content and {"bytes": content}], "question": ["?"], "answer": ["a"]}
    features = Features({"image": ImageFeature(), "question": Value("string"), "answer": Value("string")})
    DatasetDict({"test": Dataset.from_dict(rows, features)}).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="cannot read the picture of question 0"):
        QuestionTable(tmp_path).questions[0].open_picture()
    Path(tmp_path, "cut.png").write_bytes(content or b"")
    with pytest.raises(ValueError, match="cannot read the picture .*cut.png of question 7"):
        Question(7, tmp_path / "cut.png", "?").open_picture()


def test_scales_read(processor):
    assert scales_read(make_config(processor)) == [0, 1, 2]
    assert scales_read(make_config(processor, input_scales=[2, 0])) == [0, 2]


def test_all_benchmarks_are_found():
    assert [find_benchmark(name).name for name in BENCHMARKS] == list(BENCHMARKS)
    with pytest.raises(ValueError, match="benchmark='mmmu' must be one of mmbench"):
        find_benchmark("mmmu")
