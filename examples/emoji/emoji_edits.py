"""Pairs of pictures that differ in one thing, and the instruction that leads from one to the other."""

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from emoji_sets import MAN, TONES, WOMAN
from emoji_words import (
    GENDER_EDITS,
    HAIR,
    STYLE_EDITS,
    TONE_EDITS,
    addition,
    choose,
    hair_change,
    recolouring,
    removal,
)

# A picture: which set it is of, "emoji" or "scenes", and its row there.
Picture = tuple[str, int]
GENDER_SIGNS = {"2640", "2642"}
GENDER_WORDS = {"female": "woman", "male": "man"}
# How the names of drawings of several people begin.
SEVERAL_PEOPLE = ("couple", "family", "kiss:", "men ", "people ", "women ")


@dataclass(frozen=True)
class Edit:
    """`instruct(rng)` gives the instruction, without `rng` the plain one."""

    type: str
    source: Picture
    target: Picture
    instruct: Callable[[random.Random | None], str]


def genderless(codepoints: str) -> str:
    """The same for a man and a woman in one role, with one hair and one tone."""
    parts = ["1f9d1" if part in (MAN, WOMAN) else part for part in codepoints.split("-") if part not in GENDER_SIGNS]
    return "-".join(parts).removesuffix("-200d")


def hairless(codepoints: str) -> tuple[str, str]:
    """(codepoints without the hair component, the hair's words or "")."""
    parts = codepoints.split("-")
    hair = next((HAIR[part] for part in parts if part in HAIR), "")
    return "-".join(part for part in parts if part not in HAIR).removesuffix("-200d"), hair


def grouped(texts: list[dict], key: Callable[[dict], tuple]) -> list[list[int]]:
    """Rows of the texts with one key, for keys of at least two."""
    groups = defaultdict(list)
    for row, text in enumerate(texts):
        groups[key(text)].append(row)
    return [rows for rows in groups.values() if len(rows) > 1]


def style_edit(source: int, target: int, texts: list[dict]) -> Edit | None:
    style = texts[target]["style"]
    if style == texts[source]["style"]:
        return None
    instruct = lambda rng: choose(STYLE_EDITS, rng).format(style=style)  # noqa: E731
    return Edit("style", ("emoji", source), ("emoji", target), instruct)


def tone_edit(source: int, target: int, texts: list[dict]) -> Edit | None:
    """To one of the five tones; the drawing of two people has two tones and no such edit."""
    tone = texts[target]["tone"]
    if tone not in TONES.values() or tone == texts[source]["tone"]:
        return None
    return Edit("tone", ("emoji", source), ("emoji", target), lambda rng: choose(TONE_EDITS, rng).format(tone=tone))


def gender_edit(source: int, target: int, texts: list[dict]) -> Edit | None:
    """Of one person: of several, "the person" names none."""
    old, new = texts[source]["gender"], texts[target]["gender"]
    if new not in GENDER_WORDS or old == new or texts[source]["name"].startswith(SEVERAL_PEOPLE):
        return None
    word = GENDER_WORDS[new]
    return Edit(
        "gender", ("emoji", source), ("emoji", target), lambda rng: choose(GENDER_EDITS, rng).format(gender=word)
    )


def hair_edit(source: int, target: int, texts: list[dict]) -> Edit | None:
    old, new = (hairless(texts[row]["codepoints"])[1] for row in (source, target))
    if not new or old == new:
        return None
    return Edit("hair", ("emoji", source), ("emoji", target), lambda rng: hair_change(new))


def scene_edits(row: int, scenes: list[dict]) -> list[Edit]:
    """What a row of the scenes can be the target or the source of, with the picture that it was made from."""
    scene = scenes[row]
    here, origin, changed = ("scenes", row), (scene["origin_set"], scene["origin"]), scene["changed"]
    if scene["role"] == "removed":
        before = scenes[scene["origin"]]["objects"]
        thing = before[changed]
        return [
            Edit("remove", origin, here, lambda rng: removal(thing, before, rng)),
            Edit("add", here, origin, lambda rng: addition(thing, rng)),
        ]
    if scene["role"] == "recoloured":
        after = scene["objects"][changed]
        before = scenes[scene["origin"]]["objects"] if scene["origin_set"] == "scenes" else [after]
        colour, thing = after["adjective"], before[changed]
        return [Edit("colour", origin, here, lambda rng: recolouring(colour, thing, before, rng))]
    return []


class EmojiEdits:
    """All edits of a split, by type; a type without any pair is absent.

    Args:
        texts: of the emoji.
        scenes: rows of the scenes without their pictures.
    """

    def __init__(self, texts: list[dict], scenes: list[dict]):
        self.texts = texts
        plain = lambda text: (text["base"], text["style"])  # noqa: E731
        self.groups = {
            style_edit: grouped(texts, lambda text: (text["codepoints"],)),
            tone_edit: grouped(texts, plain),
            gender_edit: grouped(texts, lambda text: (genderless(text["codepoints"]), text["style"])),
            hair_edit: grouped(texts, lambda text: (hairless(text["codepoints"])[0], text["style"])),
        }
        self.listed: dict[str, list[Edit]] = defaultdict(list)
        for row in range(len(scenes)):
            for edit in scene_edits(row, scenes):
                self.listed[edit.type].append(edit)
        usable = {
            make: [rows for rows in groups if any(make(s, t, texts) for s in rows for t in rows)]
            for make, groups in self.groups.items()
        }
        self.groups = {make: groups for make, groups in usable.items() if groups}
        self.types = [make.__name__.removesuffix("_edit") for make in self.groups] + list(self.listed)

    def draw(self, rng: random.Random, type: str | None = None) -> Edit:
        """A random edit, of a random type unless one is given."""
        type = type or rng.choice(self.types)
        if type in self.listed:
            return rng.choice(self.listed[type])
        make = next(make for make in self.groups if make.__name__ == f"{type}_edit")
        while True:
            source, target = rng.sample(rng.choice(self.groups[make]), 2)
            if edit := make(source, target, self.texts):
                return edit
