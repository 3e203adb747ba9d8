"""Boxes as text: four location tokens, `<loc_i>` for each coordinate. No tokenizer is known here.

`<box>` stands for them in texts that have markup; each `<image>` is a picture that boxes may belong to. Sizes are
(width, height) in pixels, and a coordinate is one of `num_locations` equal cells of its side.
"""

import re
from collections.abc import Sequence

IMAGE_TOKEN, BOX_MARK = "<image>", "<box>"
MARKUP = re.compile(f"({IMAGE_TOKEN}|{BOX_MARK})")

Box = Sequence[float]


def location_token(index: int) -> str:
    return f"<loc_{index}>"


def format_box(box: Box, size: tuple[int, int], num_locations: int) -> str:
    """Four location tokens for (x_min, y_min, x_max, y_max) in pixels of a picture of `size`.

    Raises:
        ValueError: a box without area, or wholly outside the picture.
    """
    width, height = size
    if len(box) != 4:
        raise ValueError(f"box {tuple(box)} must be four numbers, (x_min, y_min, x_max, y_max) in pixels")
    x_min, y_min, x_max, y_max = box
    if not (max(x_min, 0) < min(x_max, width) and max(y_min, 0) < min(y_max, height)):  # so of NaN too
        raise ValueError(f"box {tuple(box)} has no area within a picture of {width} x {height} (expected xyxy pixels)")
    fractions = (x_min / width, y_min / height, x_max / width, y_max / height)
    return "".join(
        location_token(min(max(int(fraction * num_locations // 1), 0), num_locations - 1)) for fraction in fractions
    )


def parse_boxes(text: str, size: tuple[int, int], num_locations: int) -> list[tuple[float, float, float, float]]:
    """Boxes in a text, in pixels of a picture of `size`: the centres of the quantised cells, where there are such."""
    width, height = size
    four = re.compile(r"\s*".join([r"<loc_(\d+)>"] * 4))
    cells = [[(int(index) + 0.5) / num_locations for index in match] for match in four.findall(text)]
    return [(x0 * width, y0 * height, x1 * width, y1 * height) for x0, y0, x1, y1 in cells if max(x0, y0, x1, y1) < 1]


def locate_boxes(
    marks: list[str], boxes: Sequence[Box], sizes: Sequence[tuple[int, int]], num_locations: int
) -> list[str]:
    """Location tokens for each `<box>` of a text.

    A box belongs to the nearest image before it, else to the text's first.

    Args:
        marks: `<image>` and `<box>`, in the order in which they stand in the text.
        boxes: (x_min, y_min, x_max, y_max) in pixels, one for each `<box>`.
        sizes: of the picture, one for each `<image>`.

    Raises:
        ValueError: other numbers of boxes or sizes than of marks; boxes without an image.
    """
    if marks.count(BOX_MARK) != len(boxes):
        raise ValueError(f"the text holds {marks.count(BOX_MARK)} {BOX_MARK} but {len(boxes)} boxes were given")
    if not len(boxes):
        return []
    if IMAGE_TOKEN not in marks:
        raise ValueError(f"the text has {len(boxes)} boxes but no {IMAGE_TOKEN} that they belong to")
    if marks.count(IMAGE_TOKEN) != len(sizes):
        raise ValueError(
            f"the text holds {marks.count(IMAGE_TOKEN)} {IMAGE_TOKEN} but {len(sizes)} picture sizes were given"
        )
    images_before = [marks[: i + 1].count(IMAGE_TOKEN) for i, mark in enumerate(marks) if mark == BOX_MARK]
    return [
        format_box(box, sizes[max(count - 1, 0)], num_locations)
        for box, count in zip(boxes, images_before, strict=True)
    ]
