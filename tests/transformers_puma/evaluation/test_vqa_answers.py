import json
from pathlib import Path

import pytest

from transformers_puma.evaluation.vqa_answers import normalize_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes.", "yes"),
        ("The two dogs", "2 dogs"),
        ("none", "0"),
        ("ten", "10"),
        ("1,000", "1000"),
        ("3.5 feet", "3.5 feet"),
        ("U.S.", "us"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),  # lacks two apostrophes
        ("couldn'tve", "couldn't've"),
        ("shed", "shed"),
        ("she'dve", "she'd've"),
        ("dog's bed", "dog 's bed"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("(left)", "left"),
        ("10:30", "10:30"),
        ("a cat\non a\tmat", "cat on mat"),
        ("", ""),
    ],
)
def test_normalization_by_hand(answer, expected):
    assert normalize_answer(answer) == expected


def test_normalization_is_that_of_the_challenge():
    """Against what the processor of the challenge's server, in lmms-eval 0.7.3, made of texts: every contraction that
    it knows, pairs of words, and random ones."""
    pairs = json.loads(Path(__file__).with_name("vqa_reference.json").read_text(encoding="utf-8"))
    assert len(pairs) > 500
    assert [normalize_answer(text) for text, _ in pairs] == [expected for _, expected in pairs]


def test_normalization_is_that_of_lmms_eval():
    """The same on more texts, where lmms-eval is installed."""
    metric = pytest.importorskip("lmms_eval.tasks._task_utils.vqa_eval_metric")
    reference = metric.EvalAIAnswerProcessor()
    words = [*reference.CONTRACTIONS, *"a the none 1,000 3.5 U.S. dog's t-shirt yes, a/b (c) what!? 10:30".split()]
    texts = [f"{first}{between}{second}" for first in words for second in words[::29] for between in (" ", ", ", "-")]
    assert [normalize_answer(text) for text in texts] == [reference(text) for text in texts]


@pytest.mark.parametrize(("matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_soft_accuracy_of_ten_people(matches, expected):
    assert vqa_accuracy("2", ["two"] * matches + ["3"] * (10 - matches)) == pytest.approx(expected)


def test_people_who_agree_are_normalized_too():
    assert vqa_accuracy(normalize_answer("a T-shirt."), ["t-shirt"] * 10) == 1
