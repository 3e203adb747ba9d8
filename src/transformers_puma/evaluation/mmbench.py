"""MMBench: questions with two to four options, each asked with its options in every rotation.

The benchmark's file `mmbench_{split}.tsv` (github.com/open-compass/MMBench) has the columns `index`, `question`,
`hint`, `A` .. `D`, `answer` (hidden in the test split), `category`, `image` (base64), `source`, `l2-category`,
`comment`, `split`. Rotated copies of question i have the index i + 1,000,000 k, and may name the index of the row
that holds their picture in place of it.
"""

import base64
import csv
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from openpyxl import Workbook
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
from PIL import Image

from puma_files import whole_file

from .intervals import bootstrap_mean
from .questions import ALL, OPTION_LETTER, Benchmark, Question, Scores, require_fields
from .runner import Row

LETTERS = "ABCD"
COPY = 1_000_000  # distance between the indices of a question and of its rotated copies
MISSING = {"", "nan", "none"}  # as LLaVA's `model_vqa_mmbench.py` reads empty cells
LONGEST_INDEX = 64  # an `image` cell up to this length names another row, as VLMEvalKit reads it
SUBMITTED = ("index", "question", *LETTERS, "prediction", "answer", "split")


class MMBench(Benchmark):
    """Circular accuracy: a question counts if it is answered rightly in every rotation; `single_pass` is the accuracy
    in the order of the file.

    A file without rotated copies gets them here if its answers are known (choice: the server would do so with test
    questions). A free-form answer is read by rules alone: the benchmark's own script asks ChatGPT where they fail, and
    here it is wrong. `data` holds the file.
    """

    name = "mmbench"
    default_split = "dev_20230712"

    def read(self) -> list[Question]:
        rows = self._file_rows()
        pictures = {row["index"]: row["image"] for row in rows}
        questions = []
        for row in rows:
            cell = row["image"]
            if len(cell) <= LONGEST_INDEX:
                if cell not in pictures:
                    raise ValueError(f"the picture of row {row['index']} is that of row {cell}, which is not there")
                cell = pictures[cell]
            questions.append(_read_question(row, partial(decode_picture, cell)))
        ids = {question.id for question in questions}
        if lone := [question.id for question in questions if question.unit not in ids]:
            raise ValueError(f"row {lone[0]} is a rotated copy of row {lone[0] % COPY}, which is not there")
        if max(ids) >= COPY:
            return questions
        return [copy for question in questions for copy in rotations(question)]

    def judge(self, question: Question, answer: str) -> Row:
        prediction = choose_option(answer, question.options)
        if not question.answers:
            return {"prediction": prediction}
        return {"prediction": prediction, "score": float(prediction == question.answers[0])}

    def scores(self, rows: Sequence[Row]) -> Scores:
        if not all(question.answers for question in self.questions):
            return {}
        units = defaultdict(dict)
        categories = {}
        for question, row in zip(self.questions, rows, strict=True):
            units[question.unit][question.id] = 100 * row["score"]
            categories[question.unit] = question.category
        hits: dict[str, list[float]] = {self.name: []}
        for unit, scores in units.items():
            hits[self.name].append(min(scores.values()))
            if categories[unit] != ALL:
                hits.setdefault(self.row_name(categories[unit]), []).append(min(scores.values()))
        table = {name: {"accuracy": bootstrap_mean(part)} for name, part in hits.items()}
        table[self.name]["single_pass"] = bootstrap_mean([scores[unit] for unit, scores in units.items()])
        return table

    def write_submission(self, rows: Sequence[Row], folder: Path) -> Path:
        """A workbook with the answers to the file's rows, as LLaVA's `convert_mmbench_for_submission.py`."""
        answers = {row["id"]: row["answer"] for row in rows}
        book = Workbook(write_only=True)
        sheet = book.create_sheet()
        columns = None
        for row in self._file_rows():
            if columns is None:
                columns = [name for name in SUBMITTED if name in row or name == "prediction"]
                sheet.append(columns)
            if int(row["index"]) in answers:
                cells = {**row, "index": int(row["index"]), "prediction": answers[int(row["index"])]}
                sheet.append([_cell(cells[name]) for name in columns])
        file = folder / f"mmbench_{self.split}.xlsx"
        with whole_file(file) as unfinished:
            book.save(unfinished)
        return file

    def _file_rows(self) -> list[dict[str, str]]:
        file = self.data / f"mmbench_{self.split}.tsv"
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        csv.field_size_limit(2**31 - 1)  # a cell holds a whole picture
        with file.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream, delimiter="\t"))
        if not rows:
            raise ValueError(f"{file} holds no questions")
        require_fields(rows[0], ("index", "question", "hint", "A", "B", "image"), str(file))
        for number, row in enumerate(rows, start=1):
            if None in row.values():
                raise ValueError(f"{file}: row {number} has fewer cells than the header")
        return rows


def decode_picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def rotations(question: Question) -> list[Question]:
    """The question with its options in every rotation, itself first; alone where the answer is hidden."""
    if not question.answers:
        return [question]
    stem = question.prompt.removesuffix(_options_prompt(question.options))
    count, right = len(question.options), LETTERS.index(question.answers[0])
    copies = []
    for k in range(count):
        options = question.options[k:] + question.options[:k]
        copies.append(
            Question(
                id=question.id + COPY * k,
                picture=question.picture,
                prompt=stem + _options_prompt(options),
                answers=(LETTERS[(right - k) % count],),
                category=question.category,
                unit=question.unit,
                options=options,
            )
        )
    return copies


def choose_option(answer: str, options: Sequence[str]) -> str:
    """The letter that an answer names: the only one that stands alone in it, else that of the only option whose text
    it holds; empty if neither.

    These are the rules of the benchmark's own script. "A" in more than three words is taken for the article.
    """
    words = answer.split()
    letters = LETTERS[: len(options)]
    alone = {word.strip("().,:") for word in words} & set(letters)
    if len(alone) == 1 and not (alone == {"A"} and len(words) > 3):
        return alone.pop()
    held = [letter for letter, option in zip(letters, options, strict=True) if option.lower() in answer.lower()]
    return held[0] if len(held) == 1 else ""


def _read_question(row: dict[str, str], picture: Callable[[], Image.Image]) -> Question:
    options = []
    for letter in LETTERS:
        if (row.get(letter) or "").strip().lower() in MISSING:
            break
        options.append(row[letter])
    answer = (row.get("answer") or "").strip()
    if answer and answer not in LETTERS[: len(options)]:
        raise ValueError(f"row {row['index']}: answer {answer!r} is none of its {len(options)} options")
    hint = "" if row["hint"].strip().lower() in MISSING else f"{row['hint']}\n"
    return Question(
        id=int(row["index"]),
        picture=picture,
        prompt=hint + row["question"] + _options_prompt(options),
        answers=(answer,) if answer else (),
        category=row.get("l2-category") or ALL,
        unit=int(row["index"]) % COPY,
        options=tuple(options),
    )


def _options_prompt(options: Sequence[str]) -> str:
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join(["", *lines, OPTION_LETTER])


def _cell(value: str | int) -> str | int:
    return ILLEGAL_CHARACTERS_RE.sub("", value) if isinstance(value, str) else value
