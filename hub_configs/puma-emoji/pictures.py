"""Pictures of any kind in RGB, and their sizes."""

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.image_utils import get_image_size, to_numpy_array


def as_rgb(picture: Image.Image) -> Image.Image:
    """Upright, 16-bit grey in 8 bits, transparent parts on white.

    Raises:
        ValueError: grey of 32 bits that is not from 0 to 255.
    """
    # Pillow reads a PGM of 16 bits as "I". `convert` alone would clip it, nearly all to white.
    is_16_bit = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM")
    picture = ImageOps.exif_transpose(picture)
    if is_16_bit:
        picture = picture.convert("I").point(lambda value: value / 257 + 0.5).convert("L")
    if picture.mode in ("I", "F"):  # `convert` clips
        darkest, brightest = picture.getextrema()
        if darkest < 0 or brightest > 255 or (picture.mode == "F" and 0 < brightest <= 1):
            raise ValueError(f"a picture of mode {picture.mode} must be from 0 to 255, got {darkest} to {brightest}")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def picture_size(picture: Image.Image | np.ndarray | torch.Tensor) -> tuple[int, int]:
    """(width, height) of a picture, upright."""
    if not isinstance(picture, Image.Image):
        height, width = get_image_size(to_numpy_array(picture))
        return width, height
    is_lying = picture.getexif().get(ExifTags.Base.Orientation, 1) > 4
    return picture.size[::-1] if is_lying else picture.size
