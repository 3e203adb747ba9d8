"""What is said about emoji and scenes: noun phrases, captions and instructions. No pictures here.

A text is a dict with name, style, tags, base, codepoints, group, tone and gender of one emoji; an object is one entry
of a scene's `objects` (see build_scenes.py). With `rng` a function returns one of several forms, for training; without
it the plain form, for evaluation.
"""

import random
import re
from collections import Counter

CAPTIONS = (
    "{name} in {style} style",
    "{style} {name}",
    "a {style} emoji of {name}",
    "{name}, {tags}, in {style} style",
)
NUMBERS = ("zero", "one", "two", "three", "four")
# Where things lie whose places nobody names, of scenes that are drawn from words.
READING_ORDER = {
    2: ["left", "right"],
    3: ["top left", "top right", "bottom left"],
    4: ["top left", "top right", "bottom left", "bottom right"],
}
HEAD = re.compile(r"^(.*?)( (?:of|with|without|in|on|behind|arrow) .*)?$")
IRREGULAR = {
    "mouse": "mice", "goose": "geese", "ox": "oxen", "wolf": "wolves", "knife": "knives", "leaf": "leaves",
    "sheaf": "sheaves", "die": "dice", "fish": "fish", "sheep": "sheep", "deer": "deer", "moose": "moose",
    "bison": "bison", "buffalo": "buffalo", "shrimp": "shrimp", "squid": "squid", "sushi": "sushi",
    "skis": "skis", "snowman": "snowmen",
}  # fmt: skip
# Names that take neither an article nor a plural.
NO_PLURAL = {
    "bacon", "badminton", "baseball", "basketball", "bowling", "bread", "building construction", "butter",
    "chart decreasing", "chart increasing", "confetti", "construction", "cooked rice", "cooking", "curry rice",
    "custard", "dna", "field hockey", "fire", "flatbread", "fog", "garlic", "ginger root", "green salad",
    "high voltage", "ice", "ice hockey", "lacrosse", "leafy green", "locked", "locked with key", "locked with pen",
    "mate", "oden", "ping pong", "popcorn", "sake", "salt", "shaved ice", "soap", "spaghetti", "speaker high volume",
    "speaker low volume", "speaker medium volume", "tennis", "thread", "unlocked", "volleyball", "wood", "yarn",
}  # fmt: skip
STYLE_EDITS = ("change the art style to {style}", "the same in {style} style", "redraw it in {style} style")
TONE_EDITS = ("change the skin tone to {tone}", "give it {tone} skin tone")
GENDER_EDITS = ("make the person a {gender}", "change the person to a {gender}")
HAIR = {"1f9b0": "red hair", "1f9b1": "curly hair", "1f9b2": "bald", "1f9b3": "white hair"}
COLOUR_EDITS = ("make {it} {colour}", "change the colour of {it} to {colour}", "recolour {it} {colour}")
REMOVALS = ("remove {it}", "take away {it}", "delete {it}")
ADDITIONS = ("add {a} {where}", "put {a} {where}", "draw {a} {where}")
COPIES = ("the same picture", "draw it again", "copy the picture")
CONDITIONS = {
    "canny": ("turn the edges into a picture: {caption}", "draw from these edges: {caption}"),
    "masked": ("fill in the grey square: {caption}", "complete the picture: {caption}"),
    "grey": ("colour the picture: {caption}", "add the colours: {caption}"),
}


def choose(forms: tuple[str, ...] | list[str], rng: random.Random | None) -> str:
    return rng.choice(forms) if rng else forms[0]


def caption(text: dict, rng: random.Random | None = None) -> str:
    """The caption of one emoji."""
    if rng is None:
        return CAPTIONS[0].format(**{**text, "tags": ""})
    tags = [tag for tag in text["tags"] if tag.isalpha()]
    form = rng.choice(CAPTIONS if tags else CAPTIONS[:-1])
    return form.format(name=text["name"], style=text["style"], tags=" ".join(rng.sample(tags, min(3, len(tags)))))


def is_plural(name: str) -> bool:
    """Whether the name is of several things already, such as "grapes", or of a pair, such as "scissors"."""
    head = HEAD.match(name)[1]
    return head.endswith("s") and not head.endswith(("ss", "us", "is"))


def plural(name: str) -> str:
    """'ear of corn' -> 'ears of corn'."""
    if is_plural(name) or name in NO_PLURAL:
        return name
    head, rest = HEAD.match(name).groups(default="")
    *before, last = head.split(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh", "z")) or last in ("mango", "potato", "tomato", "mosquito", "flamingo"):
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return " ".join([*before, last]) + rest


def noun(thing: dict) -> str:
    """'blue car' of an object that was recoloured, else 'car'."""
    return f"{thing['adjective']} {thing['name']}".strip()


def is_alone(thing: dict, objects: list[dict]) -> bool:
    """Whether the thing's noun means no other one of `objects`: "the cat" may mean a blue cat too."""
    named = [other for other in objects if other["name"] == thing["name"]]
    return sum(thing["adjective"] in ("", other["adjective"]) for other in named) == 1


def with_article(phrase: str, name: str) -> str:
    if is_plural(name) or name in NO_PLURAL:
        return phrase
    vowel = phrase[0] in "aeiou" and not phrase.startswith(("uni", "eu", "one")) or phrase == "x-ray"
    return f"{'an' if vowel else 'a'} {phrase}"


def a(thing: dict) -> str:
    return with_article(noun(thing), thing["name"])


def where(place: str) -> str:
    """'left' -> 'on the left', 'top left' -> 'at the top left'."""
    return f"{'on' if place in ('left', 'right') else 'at'} the {place}"


def the(thing: dict, objects: list[dict]) -> str:
    """A phrase that means this object and no other one of the scene."""
    return f"the {noun(thing)}" + ("" if is_alone(thing, objects) else f" {where(thing['place'])}")


def joined(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def counted(objects: list[dict]) -> str:
    """'two cats and a dog'."""
    first = {noun(thing): thing for thing in reversed(objects)}
    counts = Counter(map(noun, objects))
    return joined([a(first[n]) if count == 1 else f"{NUMBERS[count]} {plural(n)}" for n, count in counts.items()])


def listed(objects: list[dict]) -> str:
    """'a cat at the top left and a dog at the bottom right'."""
    return joined([f"{a(thing)} {where(thing['place'])}" for thing in objects])


def relation(first: str, second: str) -> str | None:
    """How a thing at place `first` lies from one at place `second`; None where they differ in both directions."""
    sides, heights = ("left", "right"), ("top", "bottom")
    side = [next((word for word in sides if word in place), "") for place in (first, second)]
    height = [next((word for word in heights if word in place), "") for place in (first, second)]
    if side[0] != side[1] and height[0] == height[1]:
        return f"to the {side[0]} of"
    if height[0] != height[1] and side[0] == side[1]:
        return "above" if height[0] == "top" else "below"
    return None


def scene_words(objects: list[dict], rng: random.Random | None = None) -> str:
    """What a scene shows, without its style. The first form says the most of what can be checked."""
    if len(objects) == 1:
        (thing,) = objects
        return f"{a(thing)} {where(thing['place'])}" if thing["place"] else noun(thing)
    nouns, places = [noun(thing) for thing in objects], [thing["place"] for thing in objects]
    forms = [listed(objects)]
    if len(set(nouns)) < len(nouns):
        # Alike ones side by side, else the numbers leave their order open.
        return choose([counted(objects), *forms] if nouns == sorted(nouns, key=nouns.index) else forms, rng)
    if places == READING_ORDER[len(objects)]:
        forms.append(counted(objects))
    # Of two halves: two quarters side by side may be the upper ones or the lower ones.
    if len(objects) == 2 and " " not in places[0] and (way := relation(*places)):
        first, second = objects
        forms = [f"{a(first)} {way} {a(second)}", f"{a(second)} {relation(*places[::-1])} {a(first)}", *forms]
    return choose(forms, rng)


def scene_caption(objects: list[dict], style: str, rng: random.Random | None = None) -> str:
    return choose((f"{scene_words(objects, rng)} in {style} style", f"{style}: {scene_words(objects, rng)}"), rng)


def addition(thing: dict, rng: random.Random | None = None) -> str:
    return choose(ADDITIONS, rng).format(a=a(thing), where=where(thing["place"]))


def removal(thing: dict, objects: list[dict], rng: random.Random | None = None) -> str:
    return choose(REMOVALS, rng).format(it=the(thing, objects))


def recolouring(colour: str, thing: dict, objects: list[dict], rng: random.Random | None = None) -> str:
    """`thing` and `objects` as they are before."""
    it = the(thing, objects) if thing["place"] else "it"
    return choose(COLOUR_EDITS, rng).format(it=it, colour=colour)


def hair_change(hair: str) -> str:
    return "make the person bald" if hair == "bald" else f"give the person {hair}"


def copying(rng: random.Random | None = None) -> str:
    return choose(COPIES, rng)


def conditional_prompt(role: str, words: str, rng: random.Random | None = None) -> str:
    """The caption, in training half of the time after the task's instruction."""
    if rng is None or rng.random() < 0.5:
        return rng.choice(CONDITIONS[role]).format(caption=words) if rng else words
    return words
