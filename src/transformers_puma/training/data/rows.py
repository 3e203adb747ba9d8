"""Samples to training rows, stage by stage (report section 3.4 and appendix A; SPEC section 6).

Kinds of samples, with what their `content` holds and their pictures:

| kind | content | pictures | stages |
|---|---|---|---|
| pair | `caption`, perhaps `boxes` | one | decoder, pretraining, text_to_image, conditional |
| text | `text` | none | pretraining |
| conversation | `messages` | any number | pretraining, understanding |
| edit | `instruction` | source, target | editing |
| condition | `caption`, `task` | target, perhaps a condition before it | conditional |

Every draw depends on the seed and the sample's key alone: the same sample has the same crop in every epoch.
"""

import json
import random
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ...boxes_puma import IMAGE_TOKEN
from .conditions import INSTRUCTIONS, TASKS, compute_condition
from .samples import Sample, SampleCounter, open_image, sample_rng
from .transforms import WHOLE, apply_crop, center_crop, ground_caption, random_crop

Row = dict[str, Any]

STAGE_KINDS = {
    "decoder": ("pair",),
    "pretraining": ("pair", "text", "conversation"),
    "text_to_image": ("pair",),
    "editing": ("edit",),
    "conditional": ("pair", "condition"),
    "understanding": ("conversation",),
}
STAGES = tuple(STAGE_KINDS)
MIN_IMAGE_SIZES = {"decoder": 512}
# Source and target of an edit count as the same view up to this difference of their aspect ratios.
ASPECT_TOLERANCE = 0.02


@dataclass(frozen=True)
class RowMaker:
    """Makes the row of a sample; called by `IterableDataset.map` with batches of one.

    Args:
        stage: one of `STAGES`.
        kinds: of each source.
        counters: of each source.
        seed: of the draws.
        image_size: side that cropped pictures are resized to; None leaves them as the crop has them.
        min_image_size: samples with a picture whose shorter side is under it are left out.
    """

    stage: str
    kinds: dict[str, str]
    counters: dict[str, SampleCounter]
    seed: int
    image_size: int | None
    min_image_size: int

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        sample = {name: column[0] for name, column in batch.items()}
        counter = self.counters[sample["source"]]
        rows = counter.skip_if_broken(sample["key"], self.make_rows, sample)
        return {name: [value] for row in rows for name, value in row.items()}

    def make_rows(self, sample: Sample) -> list[Row]:
        """The sample's row, or none if its pictures are too small or show different views.

        Raises:
            BrokenSampleError: a picture that cannot be read.
        """
        content = json.loads(sample["content"])
        if "text" in content:
            return [{"text": content["text"]}]
        pictures = [open_image(image, self.min_image_size) for image in sample["images"]]
        if any(picture is None for picture in pictures):
            return []
        rng = sample_rng(self.seed, sample["key"], self.stage)
        kind = self.kinds[sample["source"]]
        if self.stage == "decoder":
            return [{"image": apply_crop(pictures[0], center_crop(pictures[0].size), self.image_size)}]
        if kind == "conversation":
            # Whole pictures in pretraining too: a crop would cut off the words that the answers read (**choice**).
            images = [apply_crop(picture, WHOLE, self.image_size) for picture in pictures]
            return [{"messages": content["messages"], **({"images": images} if images else {})}]
        if kind == "edit":
            return self._edit(content, *pictures, rng)
        if self.stage == "conditional":
            return self._condition(content, pictures, rng)
        return self._pair(content, pictures[0], rng)

    def _pair(self, content: dict, picture: Image.Image, rng: random.Random) -> list[Row]:
        """Text to image, and in pretraining half of the samples image to text."""
        to_image = self.stage == "text_to_image" or rng.random() < 0.5
        crop = center_crop(picture.size) if self.stage == "pretraining" else random_crop(picture.size, rng)
        image = apply_crop(picture, crop, self.image_size)
        caption, boxes = ground_caption(content["caption"], content.get("boxes", []), crop, image.size)
        prompt, completion = (caption, IMAGE_TOKEN) if to_image else (IMAGE_TOKEN, caption)
        row = {"prompt": prompt, "completion": completion, "images": [image]}
        return [row | {"boxes": boxes} if boxes else row]

    def _edit(self, content: dict, source: Image.Image, target: Image.Image, rng: random.Random) -> list[Row]:
        aspects = [picture.width / picture.height for picture in (source, target)]
        if abs(aspects[0] / aspects[1] - 1) > ASPECT_TOLERANCE:
            return []
        crop = random_crop(source.size, rng)
        images = [apply_crop(picture, crop, self.image_size) for picture in (source, target)]
        return [{"prompt": IMAGE_TOKEN + content["instruction"], "completion": IMAGE_TOKEN, "images": images}]

    def _condition(self, content: dict, pictures: list[Image.Image], rng: random.Random) -> list[Row]:
        """The caption, and with probability 0.5 the task's instruction before it."""
        images = [apply_crop(picture, center_crop(picture.size), self.image_size) for picture in pictures]
        task = content.get("task") or rng.choice(TASKS)
        if len(images) == 1:
            images.insert(0, compute_condition(images[0], task, rng))
        prompt = f"{INSTRUCTIONS[task]} {content['caption']}" if rng.random() < 0.5 else content["caption"]
        return [{"prompt": IMAGE_TOKEN + prompt, "completion": IMAGE_TOKEN, "images": images}]
