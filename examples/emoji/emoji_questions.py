"""Questions about emoji and scenes, with the type of each and its true answer.

`<box>` in a question or an answer stands for the box of the question, in pixels (x_min, y_min, x_max, y_max).
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from emoji_words import NO_PLURAL, NUMBERS, is_alone, is_plural, noun, plural, relation, the, where, with_article

WHAT, STYLE, GROUP, COLOUR = (
    "What is this?",
    "Which art style is this?",
    "Which group does it belong to?",
    "Which colour is it?",
)
BOX = "<box>"


@dataclass(frozen=True)
class Question:
    """`type` is one of `EMOJI_TYPES` or `SCENE_TYPES`."""

    type: str
    question: str
    answer: str
    box: tuple[int, int, int, int] | None = None


def group_words(group: str) -> str:
    """'food-drink' -> 'food and drink'."""
    return group.replace("-", " and ")


def yes(truth: bool) -> str:
    return "yes" if truth else "no"


def known(type: str, question: str, answer: str) -> Question | None:
    return Question(type, question, answer) if answer else None


CHECKED = {"name": "Is this {}?", "style": "Is this {} style?", "colour": "Is it {}?"}


def is_that(key: str, text: dict, other: dict, rng: random.Random) -> Question | None:
    """About one key of `CHECKED`; as often true as not, where `other` differs."""
    if not (text[key] and other[key]):
        return None
    asked = (text if rng.random() < 0.5 else other)[key]
    return Question("yes/no", CHECKED[key].format(asked), yes(asked == text[key]))


def is_this(text: dict, other: dict, rng: random.Random) -> Question:
    """About the name, the style or the colour."""
    return is_that(rng.choice(list(CHECKED)), text, other, rng) or is_that("style", text, other, rng)


# Each gives None where its question has no answer for a picture.
EMOJI_TYPES: dict[str, Callable[[dict, dict, random.Random], Question | None]] = {
    "name": lambda text, other, rng: known("name", WHAT, text["name"]),
    "style": lambda text, other, rng: known("style", STYLE, text["style"]),
    "group": lambda text, other, rng: known("group", GROUP, group_words(text["group"])),
    "colour": lambda text, other, rng: known("colour", COLOUR, text["colour"]),
    "yes/no": is_this,
}


def single_things(objects: list[dict]) -> list[dict]:
    """Objects whose noun means them alone."""
    return [thing for thing in objects if is_alone(thing, objects)]


def counting(scene: dict, other: dict, rng: random.Random) -> Question | None:
    objects = scene["objects"]
    if rng.random() < 0.4:
        return Question("counting", "How many objects are there?", NUMBERS[len(objects)])
    counts = Counter(thing["name"] for thing in objects)
    countable = [name for name in counts if not is_plural(name) and name not in NO_PLURAL]
    if not countable:
        return None
    name = rng.choice(countable)
    return Question("counting", f"How many {plural(name)} are there?", NUMBERS[counts[name]])


def at_place(thing: dict) -> Question:
    """The object of a place; no two of a scene have the same."""
    return Question("position", f"What is {where(thing['place'])}?", thing["name"])


def in_box(thing: dict) -> Question:
    """The object in a box."""
    return Question("region", f"What is in {BOX}?", thing["name"], tuple(thing["box"]))


def position(scene: dict, other: dict, rng: random.Random) -> Question | None:
    """The place of an object, or the object of a place; either way the answer is the same words each time."""
    things = single_things(scene["objects"])
    if not things:
        return None
    thing = rng.choice(things)
    if rng.random() < 0.5:
        verb = "are" if is_plural(thing["name"]) else "is"
        return Question("position", f"On which side {verb} the {noun(thing)}?", thing["place"])
    return at_place(thing)


def lies_as_said(scene: dict, rng: random.Random) -> Question | None:
    """Whether one object lies on that side of another; true half of the time."""
    things = single_things(scene["objects"])
    if len(things) < 2:
        return None
    first, second = rng.sample(things, 2)
    way = relation(first["place"], second["place"])
    if not way:
        return None
    back = relation(second["place"], first["place"])
    shown = rng.random() < 0.5
    return Question("yes/no", f"Is the {noun(first)} {way if shown else back} the {noun(second)}?", yes(shown))


def is_there(scene: dict, other: dict, rng: random.Random) -> Question:
    """Whether a thing is there; true half of the time, where `other` has things that are not."""
    names = {thing["name"] for thing in scene["objects"]}
    absent = [thing["name"] for thing in other["objects"] if thing["name"] not in names]
    shown = rng.random() < 0.5 or not absent
    name = rng.choice(sorted(names) if shown else absent)
    verb = "Are" if is_plural(name) else "Is"
    return Question("yes/no", f"{verb} there {with_article(name, name)}?", yes(shown))


def scene_yes_no(scene: dict, other: dict, rng: random.Random) -> Question:
    """Whether something is there, or lies as said."""
    asked = lies_as_said(scene, rng) if len(single_things(scene["objects"])) > 1 and rng.random() < 0.5 else None
    return asked or is_there(scene, other, rng)


def scene_colour(scene: dict, other: dict, rng: random.Random) -> Question | None:
    """Of an object whose name is said once, so that its colour need not be."""
    counts = Counter(thing["name"] for thing in scene["objects"])
    things = [thing for thing in scene["objects"] if thing["colour"] and counts[thing["name"]] == 1]
    if not things:
        return None
    thing = rng.choice(things)
    verb = "are" if is_plural(thing["name"]) else "is"
    return Question("colour", f"Which colour {verb} the {thing['name']}?", thing["colour"])


def grounding(scene: dict, other: dict, rng: random.Random) -> Question | None:
    """The box of a named object."""
    thing = rng.choice(scene["objects"])
    verb = "are" if is_plural(thing["name"]) else "is"
    return Question("grounding", f"Where {verb} {the(thing, scene['objects'])}?", BOX, tuple(thing["box"]))


SCENE_TYPES: dict[str, Callable[[dict, dict, random.Random], Question | None]] = {
    "counting": counting,
    "position": position,
    "yes/no": scene_yes_no,
    "colour": scene_colour,
    "grounding": grounding,
    "region": lambda scene, other, rng: in_box(rng.choice(scene["objects"])),
    "style": lambda scene, other, rng: Question("style", STYLE, scene["style"]),
}
