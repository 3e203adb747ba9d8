"""What the language model of the small PUMA is taught: all tasks of the report, about emoji and scenes of them.

Row i of a run is a pure function of the seed and i, so a resumed run sees the rows that an unbroken one would. All
rows of one batch are of one kind and end at one scale: causality lets a sequence stop after any scale, and short ones
are cheap.
"""

import random
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from build_dataset import SIZE
from emoji_edits import EmojiEdits, Picture
from emoji_pictures import HUES
from emoji_questions import (
    BOX,
    CHECKED,
    EMOJI_TYPES,
    SCENE_TYPES,
    Question,
    at_place,
    in_box,
    is_that,
    is_there,
    lies_as_said,
)
from emoji_sets import TONES
from emoji_words import (
    COLOUR_EDITS,
    CONDITIONS,
    COPIES,
    GENDER_EDITS,
    HAIR,
    STYLE_EDITS,
    TONE_EDITS,
    addition,
    caption,
    conditional_prompt,
    copying,
    hair_change,
    removal,
    scene_caption,
)
from torch.utils.data import Dataset

from transformers_puma import flatten_scales, multigranular_features
from transformers_puma.chat_puma import CHAT_TEMPLATE

KINDS = ("draw", "describe", "ask", "edit", "condition", "copy", "name", "find", "check")
PATCHWORKS = (1, 2, 4, 8)  # cells along a side of the grid of a picture that is to be copied
# Emoji or scenes that are asked about one after the other, and the finest scale read of each.
ALBUM, SCENES, ALBUM_SCALE = 12, 6, 2
SHOWN_ROLES = ("scene", "removed", "recoloured")  # what may be drawn from words and described


def alone(kind: str) -> tuple[float, ...]:
    """Shares of the kinds where all batches are of this one."""
    return tuple(float(name == kind) for name in KINDS)


@dataclass
class TaskMix:
    """What a run is made of.

    Attributes:
        kinds: shares of the kinds of batches, in the order of `KINDS`.
        finest_scale: shares of the scales at which pictures drawn from words end (index: scale).
        finest_scale_edits: the same for pictures drawn from pictures.
        scenes: share of composed pictures in drawing, describing and asking.
        questions: how many are asked about one picture, each of another type; the picture is most of the cost.
    """

    kinds: tuple[float, ...]
    finest_scale: tuple[float, ...] = (0.08, 0.17, 0.75, 0.0, 0.0)
    finest_scale_edits: tuple[float, ...] = (0.30, 0.40, 0.30, 0.0, 0.0)
    scenes: float = 0.5
    questions: int = 5


@dataclass
class EmojiSplit:
    """Pictures of one split, as encoder features (n, k_0, C) of the finest scale, with what is known of each.

    Attributes:
        texts: of each emoji: name, style, tags, base, codepoints, group, tone, gender and colour.
        scenes: of each composed picture: its row of build_scenes.py without the picture.
        features, scene_features: of the emoji and the scenes; only training rows need them.
    """

    texts: list[dict]
    scenes: list[dict]
    features: torch.Tensor | None = None
    scene_features: torch.Tensor | None = None

    def __post_init__(self):
        for features, described in ((self.features, self.texts), (self.scene_features, self.scenes)):
            if features is not None and len(features) != len(described):
                raise ValueError(
                    f"there are features of {len(features)} pictures, but {len(described)} pictures: remove the cache "
                    "and make it again with cache_features.py"
                )
        rows_of: dict[tuple[str, str], list[int]] = {}
        for row, text in enumerate(self.texts):
            rows_of.setdefault((text["base"], text["style"]), []).append(row)
        self.groups = list(rows_of.values())
        self.shown = [row for row, scene in enumerate(self.scenes) if scene["role"] in SHOWN_ROLES]
        self.compositions = [row for row in self.shown if self.is_scene(("scenes", row))]
        self.centred = [row for row in self.compositions if self.scenes[row]["centred"]]
        self.scattered = [row for row in self.compositions if not self.scenes[row]["centred"]]
        # Drawn from words are only pictures of which the words say all: centred scenes, and emoji in another colour.
        self.drawn = sorted(set(self.shown) - set(self.scattered))
        self.conditions = [row for row, scene in enumerate(self.scenes) if scene["role"] in CONDITIONS]
        self.edits = EmojiEdits(self.texts, self.scenes)

    def draw_emoji(self, rng: random.Random) -> int:
        """A row of a random concept in a random style, so that people's variants don't crowd out the rest."""
        return rng.choice(rng.choice(self.groups))

    def words(self, picture: Picture, rng: random.Random | None = None) -> str:
        """The caption of an emoji or a scene."""
        which, row = picture
        if which == "emoji":
            return caption(self.texts[row], rng)
        return scene_caption(self.scenes[row]["objects"], self.scenes[row]["style"], rng)

    def origin(self, row: int) -> Picture:
        """The picture that a composed one was made from."""
        return self.scenes[row]["origin_set"], self.scenes[row]["origin"]

    def is_scene(self, picture: Picture) -> bool:
        """Whether it shows several objects, not one emoji as it is or in another colour."""
        which, row = picture
        return which == "scenes" and self.origin(row)[0] != "emoji"

    def question(self, picture: Picture, rng: random.Random, type: str) -> Question | None:
        """A question of this type about a picture; None if the type has none for it."""
        which, row = picture
        if self.is_scene(picture):
            return SCENE_TYPES[type](self.scenes[row], self.scenes[rng.choice(self.shown)], rng)
        text = self.texts[row if which == "emoji" else self.origin(row)[1]]
        if which == "scenes":
            text = text | {"colour": self.scenes[row]["objects"][0]["colour"]}
        return EMOJI_TYPES[type](text, self.texts[self.draw_emoji(rng)], rng)

    def checks(self, picture: Picture, rng: random.Random) -> list[Question]:
        """Questions of yes or no about an emoji or a scene, of which none tells the answer of a later one."""
        which, row = picture
        if which == "emoji":
            text, other = self.texts[row], self.texts[self.draw_emoji(rng)]
            asked = [is_that(key, text, other, rng) for key in rng.sample(list(CHECKED), len(CHECKED))]
        else:
            scene, others = self.scenes[row], rng.sample(self.shown, 2)
            asked = [is_there(scene, self.scenes[other], rng) for other in others] + [lies_as_said(scene, rng)]
        return list({question.question: question for question in asked if question}.values())

    def questions(self, picture: Picture, rng: random.Random, count: int) -> list[Question]:
        """Up to `count` questions about a picture, of different types in random order."""
        types = list(SCENE_TYPES if self.is_scene(picture) else EMOJI_TYPES)
        asked = (self.question(picture, rng, type) for type in rng.sample(types, len(types)))
        return list(islice(filter(None, asked), count))


def all_texts(texts: list[dict]) -> list[str]:
    """What the tokenizer is trained on: every form of every task with the names of these emoji."""
    rng = random.Random(0)
    system = CHAT_TEMPLATE.split("{{- '")[1].split("' -}}")[0].replace("\\'", "'")
    lines = []
    for text in texts:
        known = text | {"colour": rng.choice(list(HUES)), "adjective": rng.choice(["", *HUES])}
        others = [rng.choice(texts) | {"colour": "red", "adjective": ""} for _ in range(2)]
        places = rng.sample(("top left", "top right", "bottom left", "bottom right"), 3)
        objects = [
            thing | {"place": where, "box": (0, 0, 1, 1)}
            for thing, where in zip([known, *others], places, strict=True)
        ]
        scene = {"style": text["style"], "objects": objects}
        questions = [ask(known, others[0], rng) for ask in EMOJI_TYPES.values()]
        questions += [ask(scene, {"objects": objects[1:]}, rng) for ask in SCENE_TYPES.values()]
        lines += [f"USER: {q.question} ASSISTANT: {q.answer}".replace(BOX, "") for q in questions if q]
        lines += [caption(text, rng), scene_caption(objects, text["style"], rng), system]
        lines += [removal(objects[0], objects, rng), addition(objects[0], rng)]
        lines.append(rng.choice(COLOUR_EDITS).format(it=rng.choice(("it", f"the {text['name']}")), colour="blue"))
        lines.append(rng.choice(STYLE_EDITS).format(style=text["style"]))
    forms = [form.format(caption="") for forms in CONDITIONS.values() for form in forms]
    forms += [form.format(tone=tone) for form in TONE_EDITS for tone in TONES.values()]
    forms += [form.format(gender=gender) for form in GENDER_EDITS for gender in ("man", "woman")]
    return lines + forms + list(COPIES) + [hair_change(hair) for hair in HAIR.values()]


class EmojiRows(Dataset):
    """Training rows for `PumaDataCollator`, with encoder features in place of pictures.

    Args:
        split: the pictures.
        num_scales: of the model.
        batch_size: rows that go into one batch.
        length: rows in the whole run.

    Raises:
        ValueError: the mix asks for what the split does not have.
    """

    def __init__(self, split: EmojiSplit, num_scales: int, batch_size: int, length: int, seed: int, mix: TaskMix):
        self.split, self.num_scales = split, num_scales
        self.batch_size, self.length, self.seed = batch_size, length, seed
        self.mix = mix
        if len(self.mix.kinds) != len(KINDS):
            raise ValueError(f"kinds={self.mix.kinds} must hold a share for each of {KINDS}")
        shares = dict(zip(KINDS, self.mix.kinds, strict=True))
        needed = {
            "scenes": (self.mix.scenes, split.shown),
            "draw": (self.mix.scenes * shares["draw"], split.drawn),
            "condition": (shares["condition"], split.conditions),
            "edit": (shares["edit"], split.edits.types),
            "find": (shares["find"], split.compositions),
            "check": (self.mix.scenes * shares["check"], split.compositions),
        }
        for name, (share, there) in needed.items():
            if share and not there:
                raise ValueError(f"the mix has a share of {share} for {name}, but the split holds none")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        batch_rng = random.Random(f"{self.seed} {index // self.batch_size}")
        kind = batch_rng.choices(KINDS, self.mix.kinds)[0]
        from_picture = kind in ("edit", "condition", "copy")
        scales = self.mix.finest_scale_edits if from_picture else self.mix.finest_scale
        finest_scale = batch_rng.choices(range(len(scales)), scales)[0]
        rng = random.Random(f"{self.seed} row {index}")
        made = {"copy": self._copy, "name": self._name, "find": self._find, "check": self._check}
        if kind in made:
            finest, row = made[kind](rng)
        else:
            pictures, row = (self._from_picture if from_picture else self._one_picture)(kind, rng)
            finest = [self._finest(picture) for picture in pictures]
        if kind == "draw" or from_picture:
            row["finest_scale"] = finest_scale
        return {**row, "image_features": [self._sequence(features) for features in finest]}

    def _copy(self, rng: random.Random) -> tuple[list[torch.Tensor], dict]:
        """A patchwork to be drawn again: the cells of a grid show pieces of four pictures, so that no piece tells what
        is beside it."""
        pictures = torch.stack([self._finest(self._any_picture(rng, self.split.shown)) for _ in range(4)])
        side, cells = round(pictures.shape[1] ** 0.5), rng.choice(PATCHWORKS)
        chosen = torch.tensor(rng.choices(range(4), k=cells * cells)).view(cells, cells)
        chosen = F.interpolate(chosen[None, None].float(), size=(side, side), mode="nearest").long().flatten()
        patchwork = pictures[chosen, torch.arange(side * side)]
        return [patchwork, patchwork], {"prompt": f"<image>{copying(rng)}", "completion": "<image>"}

    def _name(self, rng: random.Random) -> tuple[list[torch.Tensor], dict]:
        """Emoji to be named. There are many names, so it takes many pictures; their coarse scales are enough."""
        rows = [self.split.draw_emoji(rng) for _ in range(ALBUM)]
        asked = [[EMOJI_TYPES["name"](self.split.texts[row], {}, rng)] for row in rows]
        return self._album([("emoji", row) for row in rows], asked)

    def _find(self, rng: random.Random) -> tuple[list[torch.Tensor], dict]:
        """Scenes all of whose objects are to be named, by place or by box, in random order. A question of yes or no
        comes first, so that its answer is seen, not read among the names."""
        pictures = [("scenes", row) for row in rng.choices(self.split.compositions, k=SCENES)]
        asked = []
        for picture in pictures:
            objects, ask = self.split.scenes[picture[1]]["objects"], rng.choice((at_place, in_box))
            named = [ask(thing) for thing in rng.sample(objects, len(objects))]
            asked.append([self.split.question(picture, rng, "yes/no"), *named])
        return self._album(pictures, asked)

    def _check(self, rng: random.Random) -> tuple[list[torch.Tensor], dict]:
        """Emoji and scenes, each with several questions of yes or no: it takes many to learn to compare what is read
        with what is asked."""
        pictures = [self._any_picture(rng, self.split.compositions) for _ in range(ALBUM)]
        return self._album(pictures, [self.split.checks(picture, rng) for picture in pictures])

    def _album(self, pictures: list[Picture], asked: list[list[Question]]) -> tuple[list[torch.Tensor], dict]:
        finest = [self._finest(picture) for picture in pictures]
        return finest, conversation(asked) | {"finest_given_scale": ALBUM_SCALE}

    def _any_picture(self, rng: random.Random, scenes: list[int]) -> Picture:
        if rng.random() < self.mix.scenes:
            return "scenes", rng.choice(scenes)
        return "emoji", self.split.draw_emoji(rng)

    def _one_picture(self, kind: str, rng: random.Random) -> tuple[list[Picture], dict]:
        split = self.split
        picture = self._any_picture(rng, split.drawn if kind == "draw" else split.shown)
        if kind == "draw":
            return [picture], {"prompt": split.words(picture, rng), "completion": "<image>"}
        if kind == "describe":
            return [picture], {"prompt": "<image>", "completion": split.words(picture, rng)}
        return [picture], conversation([split.questions(picture, rng, self.mix.questions)])

    def _from_picture(self, kind: str, rng: random.Random) -> tuple[list[Picture], dict]:
        if kind == "edit":
            edit = self.split.edits.draw(rng)
            source, target, words = edit.source, edit.target, edit.instruct(rng)
        else:
            number = rng.choice(self.split.conditions)
            source, target = ("scenes", number), self.split.origin(number)
            words = conditional_prompt(self.split.scenes[number]["role"], self.split.words(target, rng), rng)
        return [source, target], {"prompt": f"<image>{words}", "completion": "<image>"}

    def _finest(self, picture: Picture) -> torch.Tensor:
        """(k_0, C) features of one picture."""
        which, row = picture
        return (self.split.features if which == "emoji" else self.split.scene_features)[row].float()

    def _sequence(self, finest: torch.Tensor) -> torch.Tensor:
        """(S, C) features of one picture, coarsest scale first."""
        return flatten_scales(multigranular_features(finest[None], self.num_scales))[0]


def conversation(asked: list[list[Question]]) -> dict:
    """The row of questions and their answers, a list for each picture; with boxes, also the pictures' sizes that they
    are in pixels of."""
    messages = []
    for questions in asked:
        for number, question in enumerate(questions):
            content = [{"type": "text", "text": question.question}]
            messages += [
                {"role": "user", "content": content if number else [{"type": "image"}, *content]},
                {"role": "assistant", "content": [{"type": "text", "text": question.answer}]},
            ]
    boxes = [question.box for questions in asked for question in questions if question.box is not None]
    return {"messages": messages} | ({"boxes": boxes, "image_sizes": [(SIZE, SIZE)] * len(asked)} if boxes else {})
