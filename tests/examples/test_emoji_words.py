"""The words of the emoji data: each phrase means one thing, and is what people would say."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples/emoji"))
from emoji_edits import gender_edit  # noqa: E402
from emoji_tasks import EmojiSplit  # noqa: E402
from emoji_words import plural, the  # noqa: E402


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cherry", "cherries"),
        ("monkey", "monkeys"),
        ("ear of corn", "ears of corn"),
        ("regional indicator y", "regional indicator ys"),
        ("snowman without snow", "snowmen without snow"),
        ("skis", "skis"),
    ],
)
def test_plurals(name, expected):
    assert plural(name) == expected


def thing(name: str, place: str, adjective: str = "") -> dict:
    return {"name": name, "base": name, "group": "", "place": place, "adjective": adjective, "colour": adjective}


def test_a_plain_noun_means_the_coloured_one_too():
    plain, red, dog = thing("cat", "left"), thing("cat", "right", "red"), thing("dog", "top")
    assert the(plain, [plain, red, dog]) == "the cat on the left"
    assert the(red, [plain, red, dog]) == "the red cat"
    assert the(dog, [plain, red, dog]) == "the dog"


def test_the_gender_of_several_people_is_no_edit():
    one = [{"name": f"{who} running", "gender": gender} for who, gender in (("man", "male"), ("woman", "female"))]
    several = [
        {"name": f"kiss: {who}, {who}", "gender": gender} for who, gender in (("man", "male"), ("woman", "female"))
    ]
    assert gender_edit(0, 1, one).instruct(None) and gender_edit(0, 1, several) is None


def test_questions_of_yes_or_no_are_asked_once():
    """A second time the answer could be read above."""
    scene = {"role": "scene", "origin_set": "", "origin": -1, "changed": -1, "centred": False, "style": "noto"}
    scenes = [{**scene, "objects": [thing("cat", "left"), thing("dog", "right")]} for _ in range(3)]
    split = EmojiSplit([], scenes)
    for seed in range(50):
        asked = [question.question for question in split.checks(("scenes", 0), random.Random(seed))]
        assert len(asked) >= 2 and len(set(asked)) == len(asked)
