"""What the small PUMA is asked about held-out pictures, each with its truth; one folder of it all with one command:

    python examples/emoji/emoji_evaluation.py --out data/emoji-evaluation

writes one data set (`datasets.load_from_disk`), a pure function of the data and the seed, with the parts
  questions    image, question, answer, question_type, split
  boxes        the same and box, (x_min, y_min, x_max, y_max) in pixels, for which `<box>` stands in question or answer
  edits        image, prompt, target, type, split
  conditions   image, prompt, target, type (canny, masked, grey), split
  prompts      prompt, target, type (emoji, scene), split, style, names, concepts, boxes (of a scene's objects):
               pictures to draw from words
Scenes that are asked about are scattered, those to be drawn are centred (see build_scenes.py).
Names, and what is asked with names, need known concepts: those come from the split heldout_pair. Style, group, colour,
counting and position (of which half of the answers are names, not to be known there) come from heldout_concept too,
edits and conditions from there alone. The questions without boxes can be asked as they are:

    puma eval understanding --benchmark questions --data data/emoji-evaluation --split questions --model M --out O
"""

import argparse
import random
from pathlib import Path

from build_dataset import load_emoji, save
from build_scenes import load_scenes
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from emoji_edits import Picture
from emoji_questions import EMOJI_TYPES, SCENE_TYPES
from emoji_tasks import EmojiSplit
from emoji_training import EmojiPictures
from emoji_words import CONDITIONS, conditional_prompt

TEXT, PICTURE = Value("string"), Image()
TASK = {"prompt": TEXT, "target": PICTURE, "type": TEXT, "split": TEXT}
QUESTIONS = Features({"image": PICTURE, "question": TEXT, "answer": TEXT, "question_type": TEXT, "split": TEXT})
BOXES = Features({**QUESTIONS, "box": List(Value("int32"))})
EDITS = Features({"image": PICTURE, **TASK})
PROMPTS = Features(
    {**TASK, "style": TEXT, "names": List(TEXT), "concepts": List(TEXT), "boxes": List(List(Value("int32")))}
)
# Questions that nothing but a known concept can answer; the others say less of memory when the concept is new.
NEEDS_NAMES = ("name", "region", "grounding", "yes/no")


class HeldOut:
    """One split with its pictures: what is asked about it."""

    def __init__(self, name: str, emoji: Dataset, scenes: Dataset, seed: int = 0):
        self.name, self.emoji, self.composed, self.seed = name, emoji, scenes, seed
        texts, rows = EmojiPictures(emoji).described(), scenes.remove_columns("image").to_list()
        self.split = EmojiSplit(texts, rows)

    def image(self, picture: Picture):
        which, row = picture
        return (self.emoji if which == "emoji" else self.composed)[row]["image"]

    def pictures(self, which: str, count: int, rng: random.Random) -> list[Picture]:
        """Distinct pictures in random order: of the emoji one of each concept and style; scenes that are `scattered`
        (to be asked about) or `centred` (to be drawn)."""
        if which == "emoji":
            rows = [rng.choice(group) for group in self.split.groups]
        else:
            rows = list(self.split.centred if which == "centred" else self.split.scattered)
        rng.shuffle(rows)
        return [("emoji" if which == "emoji" else "scenes", row) for row in rows[:count]]

    def questions(self, per_type: int) -> list[dict]:
        """At most `per_type` questions of each type about emoji, and of each about scenes ("scene: TYPE")."""
        asked = []
        for kind, which, types in (("emoji", "emoji", EMOJI_TYPES), ("scenes", "scattered", SCENE_TYPES)):
            for type in types:
                rng = random.Random(f"{self.seed} {self.name} {kind} {type}")
                found = 0
                for picture in self.pictures(which, len(self.composed) + len(self.emoji), rng):
                    question = self.split.question(picture, rng, type)
                    if question is None or found == per_type:
                        continue
                    found += 1
                    asked.append(
                        {
                            "image": self.image(picture),
                            "question": question.question,
                            "answer": question.answer,
                            "question_type": type if kind == "emoji" else f"scene: {type}",
                            "split": self.name,
                            "box": question.box,
                        }
                    )
        return asked

    def edits(self, per_type: int) -> list[dict]:
        """Edits in their plain words, `per_type` distinct ones of each type (fewer where there are no more)."""
        rows = []
        for type in self.split.edits.types:
            rng = random.Random(f"{self.seed} {self.name} edit {type}")
            drawn = (self.split.edits.draw(rng, type) for _ in range(20 * per_type))
            distinct = {(edit.source, edit.target): edit for edit in drawn}
            rows += [
                self._task(e.source, e.instruct(None), e.target, type) for e in list(distinct.values())[:per_type]
            ]
        return rows

    def conditions(self, per_type: int) -> list[dict]:
        """Conditional generation with the plain caption as the prompt."""
        rows = []
        for type in CONDITIONS:
            numbers = [row for row in self.split.conditions if self.split.scenes[row]["role"] == type]
            random.Random(f"{self.seed} {self.name} {type}").shuffle(numbers)
            for number in numbers[:per_type]:
                target = self.split.origin(number)
                prompt = conditional_prompt(type, self.split.words(target))
                rows.append(self._task(("scenes", number), prompt, target, type))
        return rows

    def prompts(self, per_type: int) -> list[dict]:
        """Pictures to draw from their plain captions."""
        rows = []
        for which, type in (("emoji", "emoji"), ("centred", "scene")):
            for picture in self.pictures(which, per_type, random.Random(f"{self.seed} {self.name} draw {which}")):
                shown = self.split.texts[picture[1]] if which == "emoji" else self.split.scenes[picture[1]]
                things = [shown] if which == "emoji" else shown["objects"]
                rows.append(
                    {
                        "prompt": self.split.words(picture),
                        "target": self.image(picture),
                        "type": type,
                        "split": self.name,
                        "style": shown["style"],
                        "names": [thing["name"] for thing in things],
                        "concepts": [thing["base"] for thing in things],
                        "boxes": [thing["box"] for thing in things if "box" in thing],
                    }
                )
        return rows

    def _task(self, source: Picture, prompt: str, target: Picture, type: str) -> dict:
        images = {"image": self.image(source), "target": self.image(target)}
        return {**images, "prompt": prompt, "type": type, "split": self.name}


def held_out(data: str | Path, scenes: str | Path, seed: int = 0) -> dict[str, HeldOut]:
    """The two held-out splits of the data."""
    emoji, composed = load_emoji(data), load_scenes(scenes)
    return {name: HeldOut(name, emoji[name], composed[name], seed) for name in ("heldout_concept", "heldout_pair")}


def build(splits: dict[str, HeldOut], per_type: int) -> DatasetDict:
    unseen, pairs = splits["heldout_concept"], splits["heldout_pair"]
    questions = [
        row
        for split, wanted in ((pairs, True), (unseen, False))
        for row in split.questions(per_type)
        if (row["question_type"].removeprefix("scene: ") in NEEDS_NAMES) <= wanted
    ]
    plain = [{key: row[key] for key in QUESTIONS} for row in questions if row["box"] is None]
    boxes = [row for row in questions if row["box"]]
    return DatasetDict(
        questions=Dataset.from_list(plain, features=QUESTIONS),
        boxes=Dataset.from_list(boxes, features=BOXES),
        edits=Dataset.from_list(unseen.edits(per_type), features=EDITS),
        conditions=Dataset.from_list(unseen.conditions(per_type), features=EDITS),
        prompts=Dataset.from_list(pairs.prompts(per_type), features=PROMPTS),
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--scenes", type=Path, default=Path("data/emoji-scenes"))
    parser.add_argument("--out", type=Path, default=Path("data/emoji-evaluation"))
    parser.add_argument("--per-type", type=int, default=128, help="at most so many of each type")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    evaluation = build(held_out(arguments.data, arguments.scenes, arguments.seed), arguments.per_type)
    save(evaluation, Path(arguments.data, "LICENSES.md").read_text(encoding="utf-8"), arguments.out)
    print("\n".join(f"{name}: {part.num_rows}" for name, part in evaluation.items()))


if __name__ == "__main__":
    main()
