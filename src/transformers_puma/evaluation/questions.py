"""What a benchmark of understanding is: questions about pictures, read from its own files, and its own scores.

Prompts, normalisation and scoring are those of LLaVA-1.5 (docs/Evaluation.md and scripts/v1_5/eval of its repository),
as the report says (section B.4). What stands around a prompt (picture, system message) is the processor's chat format.
"""

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from ..pictures import as_rgb
from .intervals import bootstrap_mean
from .runner import Row

SHORT_ANSWER = "Answer the question using a single word or phrase."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."
ALL = "all"

Scores = dict[str, dict[str, dict[str, float]]]  # {row: {metric: {"mean", "low", "high", "n"}}}


@dataclass(frozen=True)
class Question:
    """One question about one picture.

    id: as the benchmark's files name it.
    picture: its file, or what returns it.
    prompt: all that the user says about the picture.
    answers: of the people, in any number; empty where they are hidden.
    category: the row of the scores that it belongs to; `ALL` for none.
    unit: questions that only count together share it, such as the two about a picture of MME; default the `id`.
    options: texts of the options A, B, ..
    """

    id: int | str
    picture: Path | Callable[[], Image.Image]
    prompt: str
    answers: tuple[str, ...] = ()
    category: str = ALL
    unit: int | str | None = None
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.unit is None:
            object.__setattr__(self, "unit", self.id)

    def open_picture(self) -> Image.Image:
        """The picture in RGB.

        Raises:
            ValueError: none, or one that cannot be read.
        """
        is_file = isinstance(self.picture, Path)
        try:
            picture = Image.open(self.picture) if is_file else self.picture()
            if picture is None:
                raise ValueError("there is none")
            return as_rgb(picture)
        except Exception as error:  # the decoders raise errors of all kinds on damaged files
            name = f" {self.picture}" if is_file else ""
            raise ValueError(f"cannot read the picture{name} of question {self.id}: {error}") from error


class Benchmark(ABC):
    """The questions of a benchmark in a fixed random order, so that the first n are a fair sample of it.

    `fingerprint` is of all questions and answers of the split, so that a run does not go on with others.

    Args:
        data: folder in the benchmark's own layout, see the subclass.
        split: the part that is asked; None for `default_split`.
        limit: takes only the questions of that many units, to try a model out.

    Raises:
        ValueError: a split where there are none, files that are not as expected, or pictures that are not there.
    """

    name: ClassVar[str]
    # The metric in the report's Tables 4 and 5; it stands in the row of the benchmark's name.
    headline: ClassVar[str] = "accuracy"
    default_split: ClassVar[str | None] = None

    def __init__(self, data: str | Path, split: str | None = None, limit: int | None = None) -> None:
        if split is not None and self.default_split is None:
            raise ValueError(f"{self.name} has no splits, got split={split!r}")
        self.data, self.split = Path(data), split or self.default_split
        questions = self.read()
        require_pictures(questions)
        asked = [(q.id, q.prompt, q.answers, q.category, q.options) for q in questions]
        self.fingerprint = hashlib.sha256(repr(asked).encode()).hexdigest()[:16]
        units = list(dict.fromkeys(question.unit for question in questions))
        random.Random(0).shuffle(units)
        place = {unit: index for index, unit in enumerate(units[:limit])}
        kept = (question for question in questions if question.unit in place)
        self.questions = sorted(kept, key=lambda question: place[question.unit])

    @abstractmethod
    def read(self) -> list[Question]:
        """All questions of the split, in the order of the files."""

    @abstractmethod
    def judge(self, question: Question, answer: str) -> Row:
        """What a sample's row says of an answer: `prediction`, as it is compared, and unless the right answers are
        hidden `score`, 0 .. 1."""

    def scores(self, rows: Sequence[Row]) -> Scores:
        """Scores of the rows of all `questions`, in their order; none where the answers are hidden.

        The row of the benchmark's name is of all questions, one such as "gqa: open" of a category. Here: the mean of
        `score` in percent.
        """
        groups = self.by_category([row.get("score") for row in rows])
        return {
            name: {"accuracy": bootstrap_mean([100 * score for score in scores])}
            for name, scores in groups.items()
            if None not in scores
        }

    def by_category(self, values: Sequence[Any]) -> dict[str, list[Any]]:
        """Values of the questions in the rows that `scores` has."""
        groups: dict[str, list[Any]] = {}
        for question, value in zip(self.questions, values, strict=True):
            if question.category != ALL:
                groups.setdefault(self.row_name(question.category), []).append(value)
        return {self.name: list(values), **{name: groups[name] for name in sorted(groups)}}

    def row_name(self, category: str) -> str:
        return f"{self.name}: {category}"

    def write_submission(self, rows: Sequence[Row], folder: Path) -> Path | None:
        """Writes the file that the benchmark's server takes, where there is one."""
        return None


def short_answer_prompt(question: str) -> str:
    return f"{question}\n{SHORT_ANSWER}"


def require_pictures(questions: Iterable[Question]) -> None:
    """Raises `ValueError` for picture files that are not there, before any question is asked."""
    files = dict.fromkeys(question.picture for question in questions if isinstance(question.picture, Path))
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{len(missing)} of {len(files)} pictures are missing, such as {missing[0]}")


def read_json(file: Path) -> Any:
    """Raises `ValueError` if the file is missing or no JSON."""
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """Raises `ValueError` if the file is missing or one of its lines is no JSON."""
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number} is not valid JSON: {error}") from error
    return rows


def read_text(file: Path) -> str:
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    return file.read_text(encoding="utf-8")


def require_fields(row: Any, names: Sequence[str], where: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object with {', '.join(names)}, got {row!r}")
    missing = [name for name in names if name not in row]
    if missing:
        raise ValueError(f"{where} has no {', '.join(missing)}: expected {', '.join(names)}, got {', '.join(row)}")
