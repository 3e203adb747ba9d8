"""Questions of one's own: a table with a picture, a question, its answer and the type of the question in each row."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from .intervals import bootstrap_mean
from .questions import ALL, Benchmark, Question, Scores, read_json_lines, require_fields
from .runner import Row

FIELDS = ("image", "question", "answer")


class QuestionTable(Benchmark):
    """Exact match, without regard to case, outer spaces and a final period, beside what always giving the most
    frequent answer of a question's type scores (`majority`), and how much more the model's answers score (`gain`).

    `data` holds `{split}.jsonl` with the fields `image` (a file, from `data` on), `question`, `answer` (a text, or a
    list of those that are right; the first one counts as the frequent one) and, if the questions have types,
    `question_type`; or it is a `DatasetDict` that was saved with `save_to_disk` and has these columns, with pictures
    in `image`. A question is asked as it stands.
    """

    name = "questions"
    default_split = "test"

    def read(self) -> list[Question]:
        if (self.data / "dataset_dict.json").is_file():
            return self._read_dataset()
        file = self.data / f"{self.split}.jsonl"
        return [
            _read_row(row, index, f"row {index} of {file}", lambda name: self.data / name)
            for index, row in enumerate(read_json_lines(file))
        ]

    def judge(self, question: Question, answer: str) -> Row:
        prediction = normalize(answer)
        return {"prediction": prediction, "score": float(prediction in map(normalize, question.answers))}

    def scores(self, rows: Sequence[Row]) -> Scores:
        counts: dict[str, Counter] = {}
        for question in self.questions:
            counts.setdefault(question.category, Counter())[normalize(question.answers[0])] += 1
        frequent = {category: counter.most_common(1)[0][0] for category, counter in counts.items()}
        constant = [float(frequent[q.category] in map(normalize, q.answers)) for q in self.questions]
        groups = self.by_category([(row["score"], base) for row, base in zip(rows, constant, strict=True)])
        return {
            name: {
                "accuracy": bootstrap_mean([100 * score for score, _ in pairs]),
                "majority": bootstrap_mean([100 * base for _, base in pairs]),
                "gain": bootstrap_mean([100 * (score - base) for score, base in pairs]),
            }
            for name, pairs in groups.items()
        }

    def _read_dataset(self) -> list[Question]:
        splits = datasets.load_from_disk(self.data)
        if self.split not in splits:
            raise ValueError(f"{self.data} has no split {self.split!r}, only {', '.join(splits)}")
        rows = splits[self.split]
        if not isinstance(rows.features.get("image"), datasets.Image):
            raise ValueError(f"{self.data}: expected pictures in the column image, got {rows.features.get('image')}")

        def find_picture(index: int) -> Callable[[], Image.Image]:
            return partial(_picture, rows, index)

        return [
            _read_row({**row, "image": index}, index, f"row {index} of {self.data}", find_picture)
            for index, row in enumerate(rows.remove_columns("image"))
        ]


def normalize(answer: str) -> str:
    return answer.strip().rstrip(".").casefold()


def _picture(rows: datasets.Dataset, index: int) -> Image.Image:
    return rows[index]["image"]


def _read_row(
    row: dict[str, Any],
    index: int,
    where: str,
    find_picture: Callable[[Any], Path | Callable[[], Image.Image]],
) -> Question:
    require_fields(row, FIELDS, where)
    for name in ("image", "question"):
        if row[name] is None:
            raise ValueError(f"{where} has no {name}")
    if not isinstance(row["question"], str):
        raise ValueError(f"{where}: question must be a text, got {row['question']!r}")
    answers = row["answer"] if isinstance(row["answer"], (list, tuple)) else [row["answer"]]
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{where}: answer must be a text or a list of texts, got {row['answer']!r}")
    return Question(
        id=index,
        picture=find_picture(row["image"]),
        prompt=row["question"],
        answers=tuple(answers),
        category=row.get("question_type") or ALL,
    )
