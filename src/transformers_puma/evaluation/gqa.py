"""GQA: questions made from scene graphs, answered with one word or phrase.

`{split}_questions.json` of the download (questions1.2.zip, cs.stanford.edu/people/dorarad/gqa/download.html) maps an
id to `question`, `imageId`, `isBalanced`, `types` and, except in the test split, `answer`. Pictures are
`images/{imageId}.jpg`.
"""

from collections.abc import Sequence
from pathlib import Path

from .questions import ALL, Benchmark, Question, read_json, require_fields, short_answer_prompt
from .runner import Row, write_json

FIELDS = ("question", "imageId", "isBalanced")


class GQA(Benchmark):
    """Exact match on balanced questions, as the benchmark's own `eval.py`; also for its two kinds, `open` (whose
    structural type is `query`) and `binary`. `data` holds the question file and `images/`."""

    name = "gqa"
    default_split = "testdev_balanced"

    def read(self) -> list[Question]:
        file = self.data / f"{self.split}_questions.json"
        rows, questions = read_json(file), []
        if not isinstance(rows, dict):
            raise ValueError(f"{file} must hold an object of questions by their ids, got a {type(rows).__name__}")
        for key, row in rows.items():
            require_fields(row, FIELDS, f"question {key} in {file}")
            if row["isBalanced"]:
                questions.append(
                    Question(
                        id=key,
                        picture=self.data / "images" / f"{row['imageId']}.jpg",
                        prompt=short_answer_prompt(row["question"]),
                        answers=(row["answer"],) if "answer" in row else (),
                        category=_kind(row),
                    )
                )
        return questions

    def judge(self, question: Question, answer: str) -> Row:
        prediction = normalize_gqa(answer)
        if not question.answers:
            return {"prediction": prediction}
        return {"prediction": prediction, "score": float(prediction == question.answers[0])}

    def write_submission(self, rows: Sequence[Row], folder: Path) -> Path:
        """`[{"questionId", "prediction"}]`, for the server and for the benchmark's `eval.py`."""
        file = folder / f"{self.split}_predictions.json"
        write_json(file, [{"questionId": row["id"], "prediction": row["prediction"]} for row in rows])
        return file


def normalize_gqa(answer: str) -> str:
    """As LLaVA's `convert_gqa_for_eval.py`."""
    return answer.strip().rstrip(".").lower()


def _kind(row: dict) -> str:
    if "types" not in row:
        return ALL
    return "open" if row["types"]["structural"] == "query" else "binary"
