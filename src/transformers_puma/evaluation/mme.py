"""MME: two yes/no questions about each picture, in 14 categories of perception and cognition.

Layout of `MME_Benchmark_release_version` (repository BradyFU/Awesome-Multimodal-Large-Language-Models, branch
Evaluation), a folder for each category, in one of two forms:

    artwork/images/10002.jpg, artwork/questions_answers_YN/10002.txt
    OCR/0001.jpg, OCR/0001.txt

A text file holds a line for each question: the question, a tab, `Yes` or `No`.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .intervals import bootstrap_statistic
from .questions import Benchmark, Question, Scores, read_text, short_answer_prompt
from .runner import Row

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
GROUPS = {"perception": PERCEPTION, "cognition": COGNITION}
YES_OR_NO = "Please answer yes or no."  # stands in the files; LLaVA asks for a short answer in its place
SUFFIXES = (".jpg", ".png", ".jpeg")


class MME(Benchmark):
    """Score of a category: accuracy over questions and accuracy+ over pictures (both questions right), in percent and
    added; of perception and cognition: the sum over their categories, at most 2000 and 800. `data` holds the category
    folders."""

    name = "mme"
    headline = "perception"

    def read(self) -> list[Question]:
        questions = []
        for category in (*PERCEPTION, *COGNITION):
            folder = self.data / category
            if not folder.is_dir():
                raise ValueError(f"{folder} is missing: expected the categories {', '.join(PERCEPTION + COGNITION)}")
            split = (folder / "questions_answers_YN").is_dir()
            texts = sorted((folder / "questions_answers_YN" if split else folder).glob("*.txt"))
            if not texts:
                raise ValueError(f"{folder} holds no questions (*.txt)")
            pictures = folder / "images" if split else folder
            questions += [question for text in texts for question in _read_pair(text, pictures, category)]
        return questions

    def judge(self, question: Question, answer: str) -> Row:
        prediction = parse_yes_no(answer)
        return {"prediction": prediction, "score": float(prediction == question.answers[0])}

    def scores(self, rows: Sequence[Row]) -> Scores:
        pairs = defaultdict(lambda: defaultdict(list))
        for question, row in zip(self.questions, rows, strict=True):
            pairs[question.category][question.unit].append(row["score"])
        # (pictures, 2): share of right answers, and whether both are right, in percent
        parts = {
            category: np.array([[100 * np.mean(scores), 100 * min(scores)] for scores in pictures.values()])
            for category, pictures in pairs.items()
        }
        # A limited run can lack categories, and then has no sum over them.
        groups = {name: group for name, group in GROUPS.items() if parts.keys() >= set(group)}
        table = {self.name: {name: _total([parts[c] for c in group]) for name, group in groups.items()}}
        for category, part in parts.items():
            table[self.row_name(category)] = {
                "score": _total([part]),
                "accuracy": bootstrap_statistic([part], lambda means: means[0][:, 0]),
                "accuracy_plus": bootstrap_statistic([part], lambda means: means[0][:, 1]),
            }
        return table


def parse_yes_no(answer: str) -> str:
    """`yes`, `no` or `other`, by the first four characters, as the benchmark's own `calculation.py` reads answers."""
    start = answer.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def _total(parts: list[np.ndarray]) -> dict[str, float]:
    return bootstrap_statistic(parts, lambda means: sum(mean.sum(axis=1) for mean in means))


def _read_pair(text: Path, pictures: Path, category: str) -> list[Question]:
    lines = [line for line in read_text(text).split("\n") if line.strip()]
    candidates = [pictures / f"{text.stem}{suffix}" for suffix in SUFFIXES]
    picture = next((file for file in candidates if file.is_file()), None)
    if picture is None:
        raise ValueError(f"{text} has no picture: expected one of {', '.join(map(str, candidates))}")
    if len(lines) != 2:
        raise ValueError(f"{text} holds {len(lines)} questions, expected 2")
    pair = []
    for number, line in enumerate(lines):
        question, tab, answer = line.strip().rpartition("\t")
        if not tab or answer.strip().lower() not in ("yes", "no"):
            raise ValueError(f"{text}: expected a question, a tab and Yes or No, got {line!r}")
        prompt = short_answer_prompt(question.replace(YES_OR_NO, "").strip())
        pair.append(
            Question(
                id=f"{category}/{text.stem}/{number}",
                picture=picture,
                prompt=prompt,
                answers=(answer.strip().lower(),),
                category=category,
                unit=f"{category}/{text.stem}",
            )
        )
    return pair
