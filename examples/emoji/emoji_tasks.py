"""What the language model of the small PUMA is taught: captions, questions and edits about emoji.

Row i of a run is a pure function of the seed and i, so a resumed run sees the rows that an unbroken one would. All
rows of
one batch are of one kind and end at one scale: causality lets a sequence stop after any scale, and short ones are
    cheap.
"""

import random
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from transformers_puma import flatten_scales, multigranular_features

CAPTIONS = (
    "{name} in {style} style",
    "{style} {name}",
    "a {style} emoji of {name}",
    "{name}, {tags}, in {style} style",
)
EDITS = ("change the art style to {style}", "the same in {style} style", "redraw it in {style} style")
WHAT, STYLE, GROUP = "What is this?", "Which art style is this?", "Which group does it belong to?"
KINDS = ("draw", "describe", "ask", "edit")


@dataclass
class TaskMix:
    """Shares of the kinds of batches, and of the scales at which drawn pictures end (index: scale)."""

    kinds: tuple[float, ...] = (0.88, 0.02, 0.07, 0.03)
    finest_scale: tuple[float, ...] = (0.05, 0.15, 0.80, 0.0, 0.0)


def caption(text: dict, rng: random.Random | None = None) -> str:
    """The caption of a picture: the plain form for evaluation, any form for training."""
    if rng is None:
        return CAPTIONS[0].format(**{**text, "tags": ""})
    tags = [tag for tag in text["tags"] if tag.isalpha()]
    form = rng.choice(CAPTIONS if tags else CAPTIONS[:-1])
    return form.format(name=text["name"], style=text["style"], tags=" ".join(rng.sample(tags, min(3, len(tags)))))


def question_and_answer(text: dict, other: dict, rng: random.Random) -> tuple[str, str]:
    """A question about a picture and its answer; `other` is another picture's text, for what this is not."""
    kind = rng.randrange(4)
    if kind == 0:
        return WHAT, text["name"]
    if kind == 1:
        return STYLE, text["style"]
    if kind == 2 and text["group"]:
        return GROUP, text["group"].replace("-", " and ")
    shown = rng.random() < 0.5
    return f"Is this {(text if shown else other)['name']}?", "yes" if shown or other["name"] == text["name"] else "no"


def all_texts(texts: list[dict]) -> list[str]:
    """What the tokenizer is trained on."""
    rng = random.Random(0)
    lines = [caption(text, rng) for text in texts]
    lines += [part for text in texts for part in question_and_answer(text, rng.choice(texts), rng)]
    return lines + [form.format(style=text["style"]) for text in texts for form in EDITS]


class EmojiRows(Dataset):
    """Training rows for `PumaDataCollator`, with encoder features in place of pictures.

    Args:
        texts: a dict for each picture, with name, style, tags, base, codepoints, group.
        features: (n, k_0, C) finest-scale features of the same pictures.
        num_scales: of the model.
        batch_size: rows that go into one batch.
        length: rows in the whole run.
    """

    def __init__(
        self,
        texts: list[dict],
        features: torch.Tensor,
        num_scales: int,
        batch_size: int,
        length: int,
        seed: int,
        mix: TaskMix | None = None,
    ):
        self.texts, self.features, self.num_scales = texts, features, num_scales
        self.batch_size, self.length, self.seed = batch_size, length, seed
        self.mix = mix or TaskMix()
        self.by_concept_style: dict[tuple[str, str], list[int]] = {}
        self.by_codepoints: dict[str, list[int]] = {}
        for row, text in enumerate(texts):
            self.by_concept_style.setdefault((text["base"], text["style"]), []).append(row)
            self.by_codepoints.setdefault(text["codepoints"], []).append(row)
        self.groups = list(self.by_concept_style.values())
        self.pairs = [rows for rows in self.by_codepoints.values() if len(rows) > 1]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        batch_rng = random.Random(f"{self.seed} {index // self.batch_size}")
        kind = batch_rng.choices(KINDS, self.mix.kinds)[0]
        finest_scale = batch_rng.choices(range(len(self.mix.finest_scale)), self.mix.finest_scale)[0]
        rng = random.Random(f"{self.seed} row {index}")
        row = rng.choice(rng.choice(self.groups))
        text = self.texts[row]
        if kind == "draw":
            pictures = [row]
            example = {"prompt": caption(text, rng), "completion": "<image>", "finest_scale": finest_scale}
        elif kind == "describe":
            pictures = [row]
            example = {"prompt": "<image>", "completion": caption(text, rng)}
        elif kind == "ask":
            pictures = [row]
            question, answer = question_and_answer(text, self.texts[rng.choice(rng.choice(self.groups))], rng)
            example = {"messages": _conversation(question, answer)}
        else:
            pictures = rng.sample(rng.choice(self.pairs), 2)
            instruction = rng.choice(EDITS).format(style=self.texts[pictures[1]]["style"])
            example = {"prompt": f"<image>{instruction}", "completion": "<image>", "finest_scale": finest_scale}
        return {**example, "image_features": [self._sequence(picture) for picture in pictures]}

    def _sequence(self, row: int) -> torch.Tensor:
        """(S, C) features of one picture, coarsest scale first."""
        return flatten_scales(multigranular_features(self.features[row][None].float(), self.num_scales))[0]


def _conversation(question: str, answer: str) -> list[dict]:
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
