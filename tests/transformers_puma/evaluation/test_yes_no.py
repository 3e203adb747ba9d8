"""MME and POPE."""

import json

import pytest

from transformers_puma.evaluation.mme import COGNITION, MME, PERCEPTION, parse_yes_no
from transformers_puma.evaluation.pope import POPE, parse_polled

from .pictures import judged, means, write_picture

SHORT = "Answer the question using a single word or phrase."
WITH_SUBFOLDERS = ("artwork", "celebrity", "landmark", "posters", "scene")  # in the release


@pytest.fixture
def mme(tmp_path) -> MME:
    """Two pictures in each category."""
    for category in (*PERCEPTION, *COGNITION):
        folder = tmp_path / category
        texts = folder / "questions_answers_YN" if category in WITH_SUBFOLDERS else folder
        texts.mkdir(parents=True)
        pictures = folder / "images" if category in WITH_SUBFOLDERS else folder
        for name in ("0001.jpg", "0002.png"):
            picture = write_picture(pictures / name)
            (texts / f"{picture.stem}.txt").write_text(
                "Is there a dog? Please answer yes or no.\tYes\nIs there a cat?  Please answer yes or no.\tNo\n\n"
            )
    return MME(tmp_path)


def test_mme_questions(mme):
    assert len(mme.questions) == 14 * 4
    questions = {question.id: question for question in mme.questions}
    second = questions["artwork/0002/1"]
    assert second.prompt == f"Is there a cat?\n{SHORT}" and second.answers == ("no",)
    assert second.picture == mme.data / "artwork/images/0002.png"
    assert questions["OCR/0001/0"].picture == mme.data / "OCR/0001.jpg"


def test_mme_scores(mme):
    answers = {question.id: question.answers[0].title() for question in mme.questions}
    answers["OCR/0001/0"] = "No."  # one of two pictures half right: 75 + 50
    answers["code_reasoning/0001/1"] = "It is unclear"
    answers["code_reasoning/0002/0"] = "no"  # both pictures half right: 50 + 0
    scores = means(mme.scores(judged(mme, answers)))
    assert scores["mme"] == {"perception": 9 * 200 + 125, "cognition": 3 * 200 + 50}
    assert scores["mme: OCR"] == {"score": 125, "accuracy": 75, "accuracy_plus": 50}
    assert scores["mme: existence"] == {"score": 200, "accuracy": 100, "accuracy_plus": 100}
    interval = mme.scores(judged(mme, answers))["mme"]["cognition"]
    assert 600 <= interval["low"] <= 650 <= interval["high"] <= 700 and interval["n"] == 8


def test_a_limited_mme_has_no_sums(mme):
    limited = MME(mme.data, limit=3)
    assert len(limited.questions) == 6
    rows = judged(limited, {question.id: "Yes" for question in limited.questions})
    assert limited.scores(rows)["mme"] == {}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("Yes", "yes"), ("no, it is", "no"), ("  Yes.", "yes"), ("Not", "no"), ("It is. Yes", "other"), ("", "other")],
)
def test_mme_answers(answer, expected):
    assert parse_yes_no(answer) == expected


def test_mme_files_that_are_wrong(mme):
    (mme.data / "OCR/0001.txt").write_text("Is it?\tYes\n")
    with pytest.raises(ValueError, match=r"0001.txt holds 1 questions, expected 2"):
        MME(mme.data)
    (mme.data / "OCR/0001.txt").write_text("Is it?\tYes\nIs it? No\n")
    with pytest.raises(ValueError, match="expected a question, a tab and Yes or No, got 'Is it. No'"):
        MME(mme.data)
    with pytest.raises(ValueError, match="mme has no splits, got split='test'"):
        MME(mme.data, "test")
    with pytest.raises(ValueError, match=r"existence is missing"):
        MME(mme.data / "OCR")


@pytest.fixture
def pope(tmp_path) -> POPE:
    """Four questions in each category, two of them to be answered yes."""
    name = "COCO_val2014_000000016631.jpg"
    write_picture(tmp_path / "val2014" / name)
    for category in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": i, "image": name, "text": f"Is there a thing {i} in the image?", "label": label}
            for i, label in enumerate(["yes", "yes", "no", "no"], start=1)
        ]
        file = tmp_path / "coco" / f"coco_pope_{category}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(map(json.dumps, rows)))
    return POPE(tmp_path)


def test_pope_scores(pope):
    answers = {question.id: "Yes" if question.answers == ("yes",) else "No" for question in pope.questions}
    # adversarial: 1 true and 1 false positive, 1 false negative, 1 true negative
    answers |= {"adversarial/1": "No, there is not.", "adversarial/3": "Yes, there is."}
    # popular: nothing but yes
    answers |= {"popular/3": "Yes", "popular/4": "Yes"}
    scores = means(pope.scores(judged(pope, answers)))
    perfect = {"accuracy": 100, "precision": 100, "recall": 100, "f1": 100, "yes_ratio": 50}
    assert scores["pope: random"] == perfect
    assert scores["pope: adversarial"] == {metric: 50 for metric in perfect}
    assert scores["pope: popular"] == pytest.approx(
        {"accuracy": 50, "precision": 50, "recall": 100, "f1": 200 / 3, "yes_ratio": 100}
    )
    assert scores["pope"]["f1"] == pytest.approx((100 + 50 + 200 / 3) / 3)


def test_pope_of_a_model_that_says_no(pope):
    scores = means(pope.scores(judged(pope, {question.id: "no" for question in pope.questions})))
    assert scores["pope"] == {"accuracy": 50, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}


def test_pope_resamples_and_limits_pictures(pope):
    """Questions about one picture are no independent samples: they are drawn together."""
    for category in ("random", "popular", "adversarial"):
        file = pope.data / "coco" / f"coco_pope_{category}.json"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        more = [{**row, "question_id": row["question_id"] + 4, "image": "other.jpg"} for row in rows]
        file.write_text("\n".join(map(json.dumps, rows + more)))
    write_picture(pope.data / "val2014/other.jpg")
    both = POPE(pope.data)
    # All about one picture is right, all about the other wrong.
    answers = {q.id: q.answers[0] if q.unit == "other.jpg" else "maybe" for q in both.questions}
    answers |= {q.id: "no" for q in both.questions if q.unit != "other.jpg" and q.answers == ("yes",)}
    accuracy = both.scores(judged(both, answers))["pope"]["accuracy"]
    assert accuracy == {"mean": 50, "low": 0, "high": 100, "n": 2}
    limited = POPE(pope.data, limit=1)
    assert len(limited.questions) == 12 and len({q.unit for q in limited.questions}) == 1
    right = means(limited.scores(judged(limited, {q.id: q.answers[0] for q in limited.questions})))
    assert {row["f1"] for row in right.values()} == {100}


def test_pope_questions(pope):
    question = {question.id: question for question in pope.questions}["popular/3"]
    assert question.prompt == f"Is there a thing 3 in the image?\n{SHORT}"
    assert question.answers == ("no",) and question.category == "popular"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("Yes", "yes"), ("No", "no"), ("There is not, see.", "no"), ("A dog. No cat", "yes"), ("nothing", "yes")],
)
def test_pope_answers(answer, expected):
    assert parse_polled(answer) == expected


def test_pope_pictures_are_looked_for_first(pope):
    next((pope.data / "val2014").iterdir()).unlink()
    with pytest.raises(ValueError, match="1 of 1 pictures are missing"):
        POPE(pope.data)
