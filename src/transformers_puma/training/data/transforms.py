"""Crops, and what they do to boxes. A crop is (left, upper, right, lower) in fractions of the picture's size, so that
one crop serves pictures of different sizes: a source and its target, a condition and its picture."""

import random

from PIL import Image

from ...boxes_puma import BOX_MARK

Crop = tuple[float, float, float, float]
WHOLE: Crop = (0.0, 0.0, 1.0, 1.0)
# Shorter sides of random crops, in shorter sides of the picture (**choice**: the report gives no range).
RANDOM_CROP_SIDES = (0.8, 1.0)


def center_crop(size: tuple[int, int]) -> Crop:
    """The largest square in the middle of a picture of `size` (width, height)."""
    return _square(size, 1.0, 0.5, 0.5)


def random_crop(size: tuple[int, int], rng: random.Random) -> Crop:
    """A square somewhere in a picture: "random crop with fixed aspect ratio" (report, appendix A.2.4), the fixed ratio
    being that of what the encoder reads (**choice**)."""
    return _square(size, rng.uniform(*RANDOM_CROP_SIDES), rng.random(), rng.random())


def _square(size: tuple[int, int], scale: float, x: float, y: float) -> Crop:
    width, height = (scale * min(size) / side for side in size)
    left, upper = x * (1 - width), y * (1 - height)
    return left, upper, left + width, upper + height


def apply_crop(image: Image.Image, crop: Crop, image_size: int | None) -> Image.Image:
    """The crop of a picture, resized to a square of side `image_size`, or as large as it is.

    The whole picture is resized plainly, whatever its aspect ratio, and as the image processor does it: the encoder
    then sees a picture in training as it will when it is used.
    """
    if image_size is None:
        return image if crop == WHOLE else image.crop(_pixels(crop, image.size))
    box = None if crop == WHOLE else _pixels(crop, image.size)
    return image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box)


def _pixels(crop: Crop, size: tuple[int, int]) -> tuple[int, int, int, int]:
    left, upper, right, lower = crop
    x, y = round(left * size[0]), round(upper * size[1])
    # Width and height are rounded by themselves, so that a square stays one.
    return x, y, x + round((right - left) * size[0]), y + round((lower - upper) * size[1])


def crop_box(box: Crop, crop: Crop) -> Crop | None:
    """A box in fractions of the crop, cut at its edges; None if the crop leaves it outside."""
    left, upper, right, lower = crop
    x_min, x_max = ((min(max(x, left), right) - left) / (right - left) for x in box[::2])
    y_min, y_max = ((min(max(y, upper), lower) - upper) / (lower - upper) for y in box[1::2])
    return (x_min, y_min, x_max, y_max) if x_min < x_max and y_min < y_max else None


def ground_caption(
    caption: str, phrases: list[dict], crop: Crop, size: tuple[int, int]
) -> tuple[str, list[tuple[float, float, float, float]]]:
    """A caption with `<box>` marks behind its phrases, and the boxes they stand for.

    Args:
        phrases: {"end": where in the caption a phrase ends, "box": in fractions of the picture}.
        crop: of the picture; boxes outside it get no mark.
        size: (width, height) of the cropped picture.

    Returns:
        The text, and (x_min, y_min, x_max, y_max) in pixels of the cropped picture, in the order of the marks.
    """
    width, height = size
    pieces, boxes, written = [], [], 0
    for phrase in sorted(phrases, key=lambda phrase: phrase["end"]):
        box = crop_box(phrase["box"], crop)
        if box is None:
            continue
        pieces += [caption[written : phrase["end"]], BOX_MARK]
        boxes.append((box[0] * width, box[1] * height, box[2] * width, box[3] * height))
        written = phrase["end"]
    return "".join([*pieces, caption[written:]]), boxes
