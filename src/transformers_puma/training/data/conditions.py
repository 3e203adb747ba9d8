"""Pictures drawn from edges, from a part of themselves, or from grey: MultiGen-20M, and the same from any picture.

MultiGen-20M (Qin et al. 2023; layout from github.com/salesforce/UniControl, `train_util/dataset.py`): lines of
`json_files/aesthetics_plus_all_group_{canny,inpainting,grayscale}_all.json` (JSON lines, whatever the extension) with
`source`, the picture under `images/`, `control_{canny,inpainting,grayscale}`, the condition under `conditions/`, and
`prompt`.
"""

import functools
import random
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from .readers import Reader, line_place
from .samples import Sample, field, image_file, make_sample, text_field
from .streams import find_files, line_stream, parse_record

# Our tasks, by the names that MultiGen-20M has for them.
MULTIGEN_NAMES = {"canny": "canny", "inpainting": "inpainting", "colorization": "grayscale"}
TASKS = tuple(MULTIGEN_NAMES)

# The first is the report's (appendix A.2.4); the others are made after it.
INSTRUCTIONS = {
    "canny": "Please convert the canny image to a natural image.",
    "inpainting": "Please fill in the missing part of the image.",
    "colorization": "Please convert the grayscale image to a color image.",
}


def multigen(path: str, *, task: str, num_shards: int = 1, conditions: str = "stored") -> Reader:
    """One task of MultiGen-20M.

    Args:
        path: the folder with `json_files`, `images` and `conditions`.
        task: "canny", "inpainting" or "colorization".
        conditions: "stored" reads the data set's; "computed" makes them from the pictures with OpenCV.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if conditions not in ("stored", "computed"):
        raise ValueError(f"conditions must be 'stored' or 'computed', got {conditions!r}")
    name = MULTIGEN_NAMES[task]
    files = find_files(Path(path) / "json_files" / f"aesthetics_plus_all_group_{name}_all.json", [])
    control = f"control_{name}" if conditions == "stored" else None
    parse = functools.partial(_parse_multigen, folder=Path(path), task=task, control=control)
    return Reader(line_stream(files, num_shards), parse, line_place)


def _parse_multigen(raw: dict[str, str], folder: Path, task: str, control: str | None) -> list[Sample]:
    record = parse_record(raw)
    target = field(record, "source")
    pictures = [image_file(folder / "images", target)]
    if control is not None:
        pictures.insert(0, image_file(folder / "conditions", field(record, control)))
    return [make_sample(raw["key"], {"caption": text_field(record, "prompt"), "task": task}, pictures)]


def compute_condition(image: Image.Image, task: str, rng: random.Random) -> Image.Image:
    """The condition from which `task` draws the picture: its edges, what a mask leaves of it, or its greys."""
    if task == "canny":
        return canny(image)
    if task == "inpainting":
        return mask_rectangle(image, rng)
    return Image.fromarray(cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2GRAY)).convert("RGB")


def canny(image: Image.Image) -> Image.Image:
    """White edges on black; the thresholds of the gradient are ControlNet's defaults."""
    return Image.fromarray(cv2.Canny(np.asarray(image), 100, 200)).convert("RGB")


def mask_rectangle(image: Image.Image, rng: random.Random) -> Image.Image:
    """The picture with a black rectangle somewhere, each side 0.25 to 0.75 of the picture's (**choice**)."""
    width, height = (max(1, round(side * rng.uniform(0.25, 0.75))) for side in image.size)
    left, upper = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    masked = np.asarray(image).copy()
    cv2.rectangle(masked, (left, upper), (left + width - 1, upper + height - 1), (0, 0, 0), cv2.FILLED)
    return Image.fromarray(masked)
