"""VizWiz-VQA: pictures and spoken questions of blind people; many cannot be answered.

The challenge's files (vizwiz.org/tasks-and-datasets/vqa): `{split}.json`, a list of `image`, `question` and, except in
the test split, ten `answers` and an `answer_type`; pictures in a folder of the split's name.
"""

from collections.abc import Sequence
from pathlib import Path

from .questions import ALL, SHORT_ANSWER, Benchmark, Question, read_json, require_fields
from .runner import Row, write_json
from .vqav2 import judge_vqa

# LLaVA-1.5 (arXiv 2310.03744, appendix A), and so the tasks of lmms-eval
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


class VizWiz(Benchmark):
    """Soft accuracy, for all questions and for each type of answer. `data` holds `{split}.json` and `{split}/`."""

    name = "vizwiz"
    default_split = "test"

    def read(self) -> list[Question]:
        file = self.data / f"{self.split}.json"
        questions = []
        for row in read_json(file):
            require_fields(row, ("image", "question"), f"a question in {file}")
            questions.append(
                Question(
                    id=row["image"],
                    picture=self.data / self.split / row["image"],
                    prompt=f"{row['question']}\n{UNANSWERABLE}\n{SHORT_ANSWER}",
                    answers=tuple(answer["answer"] for answer in row.get("answers", ())),
                    category=row.get("answer_type") or ALL,
                )
            )
        return questions

    def judge(self, question: Question, answer: str) -> Row:
        return judge_vqa(question, answer)

    def write_submission(self, rows: Sequence[Row], folder: Path) -> Path:
        """`[{"image", "answer"}]`, as LLaVA's `convert_vizwiz_for_submission.py`."""
        file = folder / f"vizwiz_{self.split}.json"
        write_json(file, [{"image": row["id"], "answer": row["prediction"]} for row in rows])
        return file
