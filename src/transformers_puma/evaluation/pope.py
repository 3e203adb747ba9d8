"""POPE: is an object in the picture or not? A model that names what is not there says yes too often.

Files of the repository AoiDragon/POPE (`output/coco`): `{split}/{split}_pope_{category}.json` with a JSON object a
line: `question_id`, `image`, `text`, `label` (`yes` or `no`). Pictures are COCO's, in `val2014/`.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from .intervals import bootstrap_statistic
from .questions import Benchmark, Question, Scores, read_json_lines, require_fields, short_answer_prompt
from .runner import Row

CATEGORIES = ("random", "popular", "adversarial")


class POPE(Benchmark):
    """Accuracy, precision, recall, F1 (of yes) and the share of yes in percent, for each way to choose absent objects,
    and the means over the three. Intervals are over pictures, each of which has questions in all three. `data` holds
    the folder of the split and `val2014/`."""

    name = "pope"
    headline = "f1"
    default_split = "coco"

    def read(self) -> list[Question]:
        questions = []
        for category in CATEGORIES:
            file = self.data / self.split / f"{self.split}_pope_{category}.json"
            for row in read_json_lines(file):
                require_fields(row, ("question_id", "image", "text", "label"), f"a question in {file}")
                if row["label"] not in ("yes", "no"):
                    raise ValueError(
                        f"question {row['question_id']} in {file}: label {row['label']!r} is not yes or no"
                    )
                questions.append(
                    Question(
                        id=f"{category}/{row['question_id']}",
                        picture=self.data / "val2014" / row["image"],
                        prompt=short_answer_prompt(row["text"]),
                        answers=(row["label"],),
                        category=category,
                        unit=row["image"],
                    )
                )
        return questions

    def judge(self, question: Question, answer: str) -> Row:
        prediction = parse_polled(answer)
        return {"prediction": prediction, "score": float(prediction == question.answers[0])}

    def scores(self, rows: Sequence[Row]) -> Scores:
        # For each picture (3, 4): of each category true and false positives, false and true negatives.
        outcomes = defaultdict(lambda: np.zeros((len(CATEGORIES), 4)))
        for question, row in zip(self.questions, rows, strict=True):
            said, true = row["prediction"] == "yes", question.answers[0] == "yes"
            one = [said and true, said and not true, true and not said, not said and not true]
            outcomes[question.unit][CATEGORIES.index(question.category)] += one
        counts = np.stack(list(outcomes.values()))
        parts = {self.row_name(category): _metrics(counts[:, [i]]) for i, category in enumerate(CATEGORIES)}
        return {self.name: _metrics(counts)} | parts


def parse_polled(answer: str) -> str:
    """`no` if the first sentence holds the word no or not, else `yes`, as the benchmark's own `evaluate.py`."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def precision(rates: np.ndarray) -> np.ndarray:
    """Of shares (R, 4): true and false positives, false and true negatives. 0 if nothing is called positive."""
    return _share(rates[:, 0], rates[:, 0] + rates[:, 1])


def recall(rates: np.ndarray) -> np.ndarray:
    """0 if nothing is positive."""
    return _share(rates[:, 0], rates[:, 0] + rates[:, 2])


def f1(rates: np.ndarray) -> np.ndarray:
    """0 if nothing is positive, nor called so."""
    return _share(2 * rates[:, 0], 2 * rates[:, 0] + rates[:, 1] + rates[:, 2])


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)


METRICS = {
    "accuracy": lambda rates: rates[:, 0] + rates[:, 3],
    "precision": precision,
    "recall": recall,
    "f1": f1,
    "yes_ratio": lambda rates: rates[:, 0] + rates[:, 1],
}


def _metrics(counts: np.ndarray) -> dict[str, dict[str, float]]:
    """Each metric's mean over the parts of counts (pictures, parts, 4)."""

    def mean_of(metric: Callable[[np.ndarray], np.ndarray]) -> Callable[[list[np.ndarray]], np.ndarray]:
        def statistic(means: list[np.ndarray]) -> np.ndarray:
            (rates,) = means  # (R, parts, 4)
            rates = _share(rates, np.broadcast_to(rates.sum(2, keepdims=True), rates.shape))
            return 100 * np.mean([metric(part) for part in rates.swapaxes(0, 1)], axis=0)

        return statistic

    return {name: bootstrap_statistic([counts], mean_of(metric)) for name, metric in METRICS.items()}
