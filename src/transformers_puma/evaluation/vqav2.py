"""VQAv2: questions about COCO pictures, each answered by ten people.

The challenge's files (visualqa.org/download.html): `v2_OpenEnded_mscoco_{split}_questions.json` with `questions`
(`question_id`, `image_id`, `question`), `v2_mscoco_{split}_annotations.json` with `annotations` (`question_id`,
`answer_type`, ten `answers`) for train2014 and val2014, and pictures in folders such as
`val2014/COCO_val2014_000000000042.jpg`. Answers of test2015 and its part test-dev2015 are hidden.
"""

from collections.abc import Sequence
from pathlib import Path

from .questions import ALL, Benchmark, Question, read_json, require_fields, short_answer_prompt
from .runner import Row, write_json
from .vqa_answers import normalize_answer, vqa_accuracy

ANSWERED = ("train2014", "val2014")
SPLITS = (*ANSWERED, "test-dev2015", "test2015")


class VQAv2(Benchmark):
    """Soft accuracy, for all questions and for each type of answer. `data` holds the files and folders above."""

    name = "vqav2"
    default_split = "test-dev2015"

    def read(self) -> list[Question]:
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split!r} must be one of {', '.join(SPLITS)}")
        annotations = self._annotations() if self.split in ANSWERED else {}
        # test-dev2015 is a part of test2015: its pictures are in there, and the server wants an answer to all of it.
        whole = self.split.replace("test-dev2015", "test2015")
        self.submitted_ids = [row["question_id"] for row in self._question_rows(whole)]
        questions = []
        for row in self._question_rows(self.split):
            annotation = annotations.get(row["question_id"])
            if annotation is None and annotations:
                raise ValueError(f"question {row['question_id']} of {self.split} has no annotation")
            questions.append(
                Question(
                    id=row["question_id"],
                    picture=self.data / whole / f"COCO_{whole}_{row['image_id']:012d}.jpg",
                    prompt=short_answer_prompt(row["question"]),
                    answers=tuple(answer["answer"] for answer in annotation["answers"]) if annotation else (),
                    category=annotation["answer_type"] if annotation else ALL,
                )
            )
        return questions

    def judge(self, question: Question, answer: str) -> Row:
        return judge_vqa(question, answer)

    def write_submission(self, rows: Sequence[Row], folder: Path) -> Path:
        """`[{"question_id", "answer"}]`. For test-dev2015 with an empty answer to each further question of test2015,
        as the server wants all of them (LLaVA's `convert_vqav2_for_submission.py`)."""
        answers = {row["id"]: row["prediction"] for row in rows}
        file = folder / f"vqav2_{self.split}.json"
        write_json(file, [{"question_id": key, "answer": answers.get(key, "")} for key in self.submitted_ids])
        return file

    def _question_rows(self, split: str) -> list[dict]:
        file = self.data / f"v2_OpenEnded_mscoco_{split}_questions.json"
        rows = _list_of(file, "questions")
        for row in rows:
            require_fields(row, ("question_id", "image_id", "question"), f"a question in {file}")
        return rows

    def _annotations(self) -> dict[int, dict]:
        file = self.data / f"v2_mscoco_{self.split}_annotations.json"
        rows = _list_of(file, "annotations")
        for row in rows:
            require_fields(row, ("question_id", "answers", "answer_type"), f"an annotation in {file}")
        return {row["question_id"]: row for row in rows}


def _list_of(file: Path, name: str) -> list:
    content = read_json(file)
    require_fields(content, (name,), str(file))
    return content[name]


def judge_vqa(question: Question, answer: str) -> Row:
    """The normalised answer, and its soft accuracy where people's answers are known."""
    prediction = normalize_answer(answer)
    if not question.answers:
        return {"prediction": prediction}
    return {"prediction": prediction, "score": vqa_accuracy(prediction, question.answers)}
