"""Compose scenes, edits and conditions from the pictures of the emoji data set (about two minutes):

    python examples/emoji/build_scenes.py --data data/emoji --out data/emoji-scenes

One row is one picture with what is in it, so that every picture is encoded once. `role` says what it is:
  scene                   2 to 4 objects of one style
  removed, recoloured     the picture `origin` with its object `changed` taken away, or in another colour
  canny, grey, masked     the picture `origin` as edges, without colour, or with a grey square
`origin` is a row of this split if `origin_set` is "scenes", else of the same split of the emoji data.

Scattered scenes have objects of different sizes anywhere in their places, so that reading them takes looking: edits
and conditions are made of them, and a model is asked about them. `centred` ones have one size and one spot in each
place, so that captions say all of what they show: they are drawn from words, where what is left open becomes a blur (a
regressed feature is the mean of all that may be there), and in training read too.

Splits: train, and the two of the emoji data: `heldout_concept` shows only concepts that no training picture shows;
`heldout_pair` shows compositions: a pair of concepts that no training scene holds together (a concept with itself is
one that train never repeats), half of them with a (concept, style) pair that train lacks too.
"""

import argparse
import io
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import emoji_pictures as pictures
import numpy as np
from build_dataset import SIZE, SPLITS, fraction, load_emoji, save, to_uint8
from datasets import Dataset, DatasetDict, Features, Image, List, Value, load_from_disk
from emoji_words import READING_ORDER
from PIL import Image as PILImage
from tqdm import tqdm

GROUPS = ("animals-nature", "food-drink", "activities", "objects", "travel-places")
MORE_SUBGROUPS = ("face-costume", "heart", "monkey-face")
# Backgrounds, and what cannot be told apart at half the size.
LESS_SUBGROUPS = ("time", "place-geographic", "place-map", "place-other", "hotel")
NEVER_RECOLOURED = ("people-body", "flags", "component", "")
HELDOUT_COMPOSITIONS = 0.10
LAYOUTS = {"beside": 0.25, "stacked": 0.2, "cells": 0.25, "count": 0.15, "mixed": 0.15}
# (x, y, width, height) of where an object of a place may be, at 64 pixels.
PLACES = {
    "left": (0, 8, 32, 48), "right": (32, 8, 32, 48), "top": (8, 0, 48, 32), "bottom": (8, 32, 48, 32),
    "top left": (0, 0, 32, 32), "top right": (32, 0, 32, 32),
    "bottom left": (0, 32, 32, 32), "bottom right": (32, 32, 32, 32),
}  # fmt: skip
CELLS = [place for place in PLACES if " " in place]
OBJECT_SIZES = (24, 31)  # of the longer side
CENTRED_SIZE = 28
MASK_SIZES = (20, 32)
RECOLOURED_SHARE = 0.2  # of scenes show an object in a colour that is not its own from the start
MAX_TRIES = 5000


@dataclass(frozen=True)
class Counts:
    """How much a split gets: families (a scene and its edits), how many pictures get conditions or a colour, and
    scenes without edits, scattered or centred."""

    families: int
    conditioned_scenes: int = 0
    conditioned_emoji: int = 0
    recoloured_emoji: int = 0
    more_scenes: int = 0
    centred_scenes: int = 0
    edits: bool = True


CENTRED_SCENES = 24000
COUNTS = {
    "train": Counts(4400, 800, 2600, 3000, more_scenes=12000, centred_scenes=CENTRED_SCENES),
    "heldout_concept": Counts(256, 128, 256, 256),
    "heldout_pair": Counts(512, centred_scenes=512, edits=False),
}
OBJECT_COLUMNS = ("name", "base", "group", "place", "adjective", "colour")
FEATURES = Features(
    {
        "image": Image(),
        "role": Value("string"),
        "origin_set": Value("string"),
        "origin": Value("int32"),
        "changed": Value("int32"),
        "style": Value("string"),
        "centred": Value("bool"),
        "objects": List({**{name: Value("string") for name in OBJECT_COLUMNS}, "box": List(Value("int32"))}),
    }
)


@dataclass(frozen=True)
class Placed:
    """An object of a scene: row of the library, named place, box (x_min, y_min, x_max, y_max), colour given or ""."""

    row: int
    place: str
    box: tuple[int, int, int, int]
    adjective: str = ""


class Library:
    """Emoji pictures and texts that scenes are made of; `styles` maps style -> concept -> rows usable as objects."""

    def __init__(self, pixels: np.ndarray, texts: list[dict], preferred: range | None = None):
        self.pixels, self.texts = pixels, texts
        self.styles: dict[str, dict[str, list[int]]] = {}
        self.preferred: dict[str, list[str]] = {}
        for row, text in enumerate(texts):
            if not usable(text) or (pixels[row] >= pictures.NEARLY_WHITE).all():
                continue
            self.styles.setdefault(text["style"], {}).setdefault(text["base"], []).append(row)
            if preferred is not None and row in preferred:
                self.preferred.setdefault(text["style"], []).append(text["base"])
        self.cut_out = lru_cache(maxsize=50_000)(self._cut_out)

    def _cut_out(self, row: int, adjective: str) -> np.ndarray | None:
        """The object alone, with all white around it cut away; None if it cannot get the colour `adjective`."""
        x0, y0, x1, y1 = pictures.bounding_box(self.pixels[row])
        cut = self.pixels[row, y0:y1, x0:x1]
        return pictures.recolour(cut, adjective) if adjective else cut

    def colours(self, row: int) -> list[str]:
        """The colours that the object can get."""
        text = self.texts[row]
        if text["group"] in NEVER_RECOLOURED or set(text["name"].split()) & set(pictures.COLOURS):
            return []
        return [colour for colour in pictures.HUES if self.cut_out(row, colour) is not None]

    def describe(self, placed: Placed) -> dict:
        text = self.texts[placed.row]
        colour = placed.adjective or pictures.colour_of(self.cut_out(placed.row, ""))
        return {
            **{key: text[key] for key in ("name", "base", "group")},
            "place": placed.place,
            "adjective": placed.adjective,
            "colour": colour,
            "box": list(placed.box),
        }


def usable(text: dict) -> bool:
    """Whether an emoji is a thing with a short plain name, without variants."""
    in_group = text["group"] in GROUPS and text["subgroup"] not in LESS_SUBGROUPS
    name = text["name"]
    return (
        (in_group or text["subgroup"] in MORE_SUBGROUPS)
        and text["codepoints"] == text["base"]
        and len(name) <= 22
        and name.replace(" ", "").replace("-", "").isalpha()
    )


def is_heldout(bases: list[str]) -> bool:
    """Whether a scene of these concepts holds a pair that is kept from training."""
    pairs = itertools.combinations(sorted(bases), 2)
    return any(fraction("composition", *pair) < HELDOUT_COMPOSITIONS for pair in pairs)


def render(library: Library, scene: list[Placed]) -> np.ndarray:
    canvas = np.full((SIZE, SIZE, 3), 255, dtype=np.uint8)
    for placed in scene:
        x0, y0, x1, y1 = placed.box
        cut = PILImage.fromarray(library.cut_out(placed.row, placed.adjective))
        canvas[y0:y1, x0:x1] = np.asarray(cut.resize((x1 - x0, y1 - y0), PILImage.Resampling.LANCZOS))
    return canvas


def place(library: Library, row: int, where: str, centred: bool, rng: random.Random) -> Placed:
    """The object in a place: in its middle, or at a random size and position."""
    height, width = library.cut_out(row, "").shape[:2]
    scale = (CENTRED_SIZE if centred else rng.randint(*OBJECT_SIZES)) / max(width, height)
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    x, y, free_width, free_height = PLACES[where]
    room = free_width - width, free_height - height
    shift_x, shift_y = (space // 2 if centred else rng.randint(0, space) for space in room)
    x, y = x + shift_x, y + shift_y
    return Placed(row, where, (x, y, x + width, y + height))


def draw_concepts(library: Library, style: str, layout: str, rng: random.Random) -> list[str]:
    """The concepts of a scene, the preferred ones of the library first half of the time."""
    bases = list(library.styles[style])
    number = {"beside": 2, "stacked": 2, "count": 1, "mixed": 2}.get(layout) or rng.randint(2, 4)
    chosen = rng.sample(bases, min(number, len(bases)))
    if style in library.preferred and rng.random() < 0.5:
        first = rng.choice(library.preferred[style])
        chosen = [first, *[base for base in chosen if base != first]][:number]
    if layout == "count":
        return chosen * rng.randint(2, 4)
    return chosen + chosen[:1] if layout == "mixed" or len(chosen) == 1 else chosen


def draw_places(layout: str, number: int, centred: bool, rng: random.Random) -> list[str]:
    """Where the objects of a scene lie."""
    if fixed := {"beside": ["left", "right"], "stacked": ["top", "bottom"]}.get(layout):
        return rng.sample(fixed, 2)
    if centred and layout != "cells":
        return READING_ORDER[number]
    return rng.sample(CELLS, number)


def draw_scene(library: Library, heldout: bool | None, rng: random.Random, centred: bool = False) -> list[Placed]:
    """A random scene; `heldout` says whether its composition is to be one of those kept from training (None: either).

    Raises:
        ValueError: the library has no such composition.
    """
    styles = sorted(library.styles)
    for _ in range(MAX_TRIES):
        # Styles in proportion to what they have to show.
        style = rng.choices(styles, [len(library.styles[style]) for style in styles])[0]
        layout = rng.choices(list(LAYOUTS), list(LAYOUTS.values()))[0]
        bases = draw_concepts(library, style, layout, rng)
        if heldout is not None and is_heldout(bases) != heldout:
            continue
        row_of = {base: rng.choice(library.styles[style][base]) for base in sorted(set(bases))}
        places = draw_places(layout, len(bases), centred, rng)
        if centred:
            bases = sorted(bases, key=bases.index)  # alike ones side by side
        scene = [place(library, row_of[base], where, centred, rng) for base, where in zip(bases, places, strict=True)]
        return sorted(scene, key=lambda placed: list(PLACES).index(placed.place))
    raise ValueError(
        f"no scene with heldout={heldout} in {MAX_TRIES} tries: {len(library.texts)} pictures are too few"
    )


def recoloured(library: Library, scene: list[Placed], rng: random.Random) -> tuple[list[Placed], int] | None:
    """The scene with one of its objects in another colour, and which; None if none can."""
    for number in rng.sample(range(len(scene)), len(scene)):
        colours = [] if scene[number].adjective else library.colours(scene[number].row)
        if colours:
            changed = replace(scene[number], adjective=rng.choice(colours))
            return [*scene[:number], changed, *scene[number + 1 :]], number
    return None


def png(pixels: np.ndarray) -> dict:
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def make_row(
    pixels: np.ndarray,
    role: str,
    style: str,
    objects: list[dict],
    origin: tuple[str, int] = ("", -1),
    changed: int = -1,
    centred: bool = False,
) -> dict:
    return {
        "image": png(pixels),
        "role": role,
        "origin_set": origin[0],
        "origin": origin[1],
        "changed": changed,
        "style": style,
        "centred": centred,
        "objects": objects,
    }


def family(
    library: Library, heldout: bool | None, edits: bool, start: int, rng: random.Random, centred: bool = False
) -> Iterator[dict]:
    """A scene and, with `edits`, the same scene without an object and with one in another colour.

    Args:
        start: the scene's row in its split.
    """
    scene = draw_scene(library, heldout, rng, centred)
    if rng.random() < RECOLOURED_SHARE and (changed := recoloured(library, scene, rng)):
        scene = changed[0]
    style = library.texts[scene[0].row]["style"]

    def row(role: str, shown: list[Placed], **origin) -> dict:
        return make_row(render(library, shown), role, style, [library.describe(placed) for placed in shown], **origin)

    yield row("scene", scene, centred=centred)
    if edits:
        gone = rng.randrange(len(scene))
        yield row("removed", scene[:gone] + scene[gone + 1 :], origin=("scenes", start), changed=gone)
        if changed := recoloured(library, scene, rng):
            yield row("recoloured", changed[0], origin=("scenes", start), changed=changed[1])


def conditions(
    pixels: np.ndarray, style: str, objects: list[dict], origin: tuple[str, int], rng: random.Random
) -> Iterator[dict]:
    """A picture's edges, grey version and masked version; no grey one of a picture that has no colour."""
    side = rng.randint(*MASK_SIZES)
    x0, y0, x1, y1 = rng.choice(objects)["box"]
    # Over an object's middle, else there is nothing to fill in.
    x, y = ((low + high - side) // 2 + rng.randint(-6, 6) for low, high in ((x0, x1), (y0, y1)))
    x, y = (min(max(start, 0), SIZE - side) for start in (x, y))
    yield make_row(pictures.canny(pixels), "canny", style, objects, origin)
    yield make_row(pictures.masked(pixels, x, y, side), "masked", style, objects, origin)
    grey = pictures.greyscale(pixels)
    if not np.array_equal(grey, pixels):
        yield make_row(grey, "grey", style, objects, origin)


def spread(library: Library, rng: random.Random) -> list[int]:
    """One drawn picture of every concept in every style, in random order, so that people don't crowd out the rest."""
    groups: dict[tuple[str, str], list[int]] = {}
    for row, text in enumerate(library.texts):
        groups.setdefault((text["base"], text["style"]), []).append(row)
    rows = [rng.choice(group) for group in groups.values()]
    rng.shuffle(rows)
    return [row for row in rows if pictures.bounding_box(library.pixels[row])]


def alone(library: Library, row: int, adjective: str = "") -> Placed:
    return Placed(row, "", pictures.bounding_box(library.pixels[row]), adjective)


def build_split(split: str, library: Library, counts: Counts, seed: int) -> Dataset:
    """All rows of a split: a pure function of the pictures, the seed and each row's own number."""
    heldout = {"train": False, "heldout_pair": True}.get(split)
    rows: list[dict] = []
    scenes: list[int] = []
    for number in tqdm(range(counts.families), desc=f"scenes, {split}"):
        scenes.append(len(rows))
        rng = random.Random(f"{seed} {split} family {number}")
        rows += family(library, heldout, counts.edits, len(rows), rng)
    for start in scenes[: counts.conditioned_scenes]:
        scene, rng = rows[start], random.Random(f"{seed} {split} conditions {start}")
        pixels = np.asarray(PILImage.open(io.BytesIO(scene["image"]["bytes"])))
        rows += conditions(pixels, scene["style"], scene["objects"], ("scenes", start), rng)

    emoji = spread(library, random.Random(f"{seed} {split} emoji"))
    for row in emoji[: counts.conditioned_emoji]:
        rng = random.Random(f"{seed} {split} emoji {row}")
        style, objects = library.texts[row]["style"], [library.describe(alone(library, row))]
        rows += conditions(library.pixels[row], style, objects, ("emoji", row), rng)
    coloured = ((row, colours) for row in emoji if (colours := library.colours(row)))
    for row, colours in itertools.islice(coloured, counts.recoloured_emoji):
        shown = alone(library, row, random.Random(f"{seed} {split} colour {row}").choice(colours))
        pixels = pictures.recolour(library.pixels[row], shown.adjective)
        if pixels is not None:
            objects = [library.describe(shown)]
            rows.append(make_row(pixels, "recoloured", library.texts[row]["style"], objects, ("emoji", row), 0))

    for number in tqdm(range(counts.more_scenes), desc=f"more scenes, {split}", disable=not counts.more_scenes):
        rng = random.Random(f"{seed} {split} scene {number}")
        rows += family(library, heldout, False, len(rows), rng)
    for number in tqdm(range(counts.centred_scenes), desc=f"centred, {split}", disable=not counts.centred_scenes):
        rng = random.Random(f"{seed} {split} centred {number}")
        rows += family(library, heldout, False, len(rows), rng, centred=True)
    return Dataset.from_list(rows, features=FEATURES)


def build(data: Path, share: float, seed: int, centred: int = CENTRED_SCENES) -> DatasetDict:
    """The splits, each with `share` of the usual number of rows; `centred` is that of train's centred scenes. They are
    its last rows: with more of them, those that there were stay."""
    emoji = load_emoji(data)
    pixels = {name: to_uint8(split) for name, split in emoji.items()}
    texts = {name: split.remove_columns("image").to_list() for name, split in emoji.items()}
    # New compositions are made of pictures that train shows one by one, and of the unseen pairs.
    known = len(texts["train"])
    both = [texts["train"] + texts["heldout_pair"], np.concatenate([pixels["train"], pixels["heldout_pair"]])]
    libraries = {name: Library(pixels[name], texts[name]) for name in ("train", "heldout_concept")}
    libraries["heldout_pair"] = Library(both[1], both[0], preferred=range(known, len(both[0])))

    def scaled(counts: Counts) -> Counts:
        numbers = {name: -(-value * share // 1) for name, value in vars(counts).items() if name != "edits"}
        return Counts(**{name: int(value) for name, value in numbers.items()}, edits=counts.edits)

    counts = COUNTS | {"train": replace(COUNTS["train"], centred_scenes=centred)}
    return DatasetDict({name: build_split(name, libraries[name], scaled(counts[name]), seed) for name in SPLITS})


def load_scenes(path: str | Path) -> DatasetDict:
    """The data set that this command built at `path`.

    Raises:
        FileNotFoundError: nothing is built there; the message holds the command that does it.
        ValueError: what is there was built by an earlier version of it.
    """
    if not Path(path, "dataset_dict.json").exists():
        raise FileNotFoundError(f"no scenes at {path}; build them with: python examples/emoji/build_scenes.py")
    scenes = load_from_disk(str(path))
    for name, split in scenes.items():
        if split.features != FEATURES:
            raise ValueError(
                f"{path} has other columns in {name} ({', '.join(split.column_names)}) than scenes have today: remove "
                "it and what was cached of it, and build them with: python examples/emoji/build_scenes.py"
            )
    return scenes


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="folder that build_dataset.py wrote")
    parser.add_argument("--out", type=Path, default=Path("data/emoji-scenes"), help="folder of the scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="part of the usual number of rows, to try things out")
    parser.add_argument("--centred", type=int, default=CENTRED_SCENES, help="centred scenes of train at a share of 1")
    arguments = parser.parse_args(argv)
    if arguments.centred < 0:
        parser.error(f"--centred is {arguments.centred}; it must not be negative")
    if not 0 < arguments.share <= 1:
        parser.error(f"--share is {arguments.share}; it must be above 0 and at most 1")
    scenes = build(arguments.data, arguments.share, arguments.seed, arguments.centred)
    save(scenes, Path(arguments.data, "LICENSES.md").read_text(encoding="utf-8"), arguments.out)
    print("\n".join(f"{name}: {split.num_rows} pictures" for name, split in scenes.items()))


if __name__ == "__main__":
    main()
