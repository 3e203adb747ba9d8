"""Captions and instructions of the small model: plain words that mean one picture."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "emoji"))

import emoji_words as words  # noqa: E402
from emoji_edits import genderless, hairless  # noqa: E402

MAN, WOMAN, ZWJ, RED_HAIR = "1f468", "1f469", "200d", "1f9b0"


def thing(name, place="left", adjective=""):
    return {
        "name": name,
        "place": place,
        "adjective": adjective,
        "colour": adjective,
        "base": name,
        "group": "objects",
    }


@pytest.mark.parametrize(
    "objects, expected",
    [
        ([thing("pizza"), thing("car", "right", "blue")], "a pizza to the left of a blue car"),
        ([thing("cat", "top"), thing("house", "bottom")], "a cat above a house"),
        ([thing("apple", place) for place in ("top left", "top right", "bottom left")], "three apples"),
        ([thing("owl", "top left"), thing("dna", "bottom right")], "an owl at the top left and dna at the bottom right"),  # noqa: E501
        ([thing("cat", "top left"), thing("cat", "top right"), thing("dog", "bottom left")], "two cats and a dog"),
        ([thing("cat", "top left"), thing("dog", "top right"), thing("cat", "bottom left")],
         "a cat at the top left, a dog at the top right and a cat at the bottom left"),
        ([thing("cat", "top left"), thing("dog", "top right")], "a cat at the top left and a dog at the top right"),
        ([thing("grapes")], "grapes on the left"),
        ([thing("clown face", "", "green")], "green clown face"),
    ],
)  # fmt: skip
def test_the_plain_words_of_a_scene(objects, expected):
    assert words.scene_caption(objects, "noto") == f"{expected} in noto style"


@pytest.mark.parametrize(
    "name, expected",
    [("ear of corn", "ears of corn"), ("cherry", "cherries"), ("mouse", "mice"), ("bus", "buses"), ("toy", "toys"),
     ("glasses", "glasses"), ("sushi", "sushi"), ("cloud with rain", "clouds with rain"), ("torch", "torches")],
)  # fmt: skip
def test_plurals(name, expected):
    assert words.plural(name) == expected


def test_objects_are_counted_where_no_place_need_be_named():
    def said(*objects):
        return {words.scene_words(list(objects), random.Random(seed)) for seed in range(40)}

    assert "a cat and a dog" in said(thing("cat", "left"), thing("dog", "right"))
    assert "a cat and a dog" not in said(thing("cat", "top"), thing("dog", "bottom"))
    assert "a cat and a dog" not in said(thing("cat", "top left"), thing("dog", "top right"))


def test_instructions_mean_one_object():
    apples = [thing("apple", "top left"), thing("apple", "top right"), thing("cat", "bottom left")]
    assert words.removal(apples[1], apples) == "remove the apple at the top right"
    assert words.removal(apples[2], apples) == "remove the cat"
    assert words.addition(apples[2]) == "add a cat at the bottom left"
    assert words.recolouring("blue", apples[2], apples) == "make the cat blue"
    assert words.recolouring("blue", thing("cat", ""), [thing("cat", "")]) == "make it blue"


def test_gender_and_hair_keys():
    assert genderless(f"{MAN}-1f3ff-{ZWJ}-2695") == genderless(f"{WOMAN}-1f3ff-{ZWJ}-2695")
    assert genderless(f"1f3c3-{ZWJ}-2642") == "1f3c3"
    assert hairless(f"{WOMAN}-{ZWJ}-{RED_HAIR}") == (WOMAN, "red hair")
    assert hairless(WOMAN) == (WOMAN, "")
