"""Picture files: read and written with errors that say which file and why. Imports PIL only when called."""

import os
from pathlib import Path
from typing import IO, TYPE_CHECKING

from puma_files import whole_file

from .errors import UserError, one_line

if TYPE_CHECKING:
    from PIL import Image


def read_picture(file: str | Path) -> "Image.Image":
    """A picture file in RGB, upright, transparent parts on white.

    Raises:
        UserError: no such file, or not a picture.
    """
    file = Path(file)
    if not file.exists():
        raise UserError(f"no such file: {file}")
    if not file.is_file():
        raise UserError(f"not a file: {file}")
    return decode_picture(file, str(file))


def decode_picture(file: Path | IO[bytes], name: str) -> "Image.Image":
    """As `read_picture`, also of an open file; `name` is what errors call it."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            # As in `transformers_puma.pictures`, whose import takes longer than telling of a user's mistake may.
            is_16_bit = opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format == "PPM")
            picture = ImageOps.exif_transpose(opened)
            if is_16_bit:
                picture = picture.convert("I").point(lambda value: value / 257 + 0.5).convert("L")
            picture = picture.convert("RGBA")
    except UnidentifiedImageError as error:
        raise UserError(f"not a picture: {name}") from error
    except Exception as error:  # the decoders raise errors of all kinds on damaged files
        raise UserError(f"cannot read the picture {name}: {one_line(error)}") from error
    background = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(background, picture).convert("RGB")


def check_output(file: str | Path) -> Path:
    """The path of a PNG that can be written; to be called before any work is done for it.

    Raises:
        UserError: not named `.png`, a folder, or in a folder that is missing or not writable.
    """
    file = Path(file)
    if file.suffix.lower() != ".png":
        raise UserError(f"the output must be a .png file, got {file}")
    if file.is_dir():
        raise UserError(f"the output is a folder: {file}")
    if not file.parent.is_dir():
        raise UserError(f"no such folder for the output: {file.parent}")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise UserError(f"the folder of the output is not writable: {file.parent}")
    return file


def write_png(picture: "Image.Image", file: Path) -> None:
    """Writes a whole file or none."""
    with whole_file(file) as unfinished:
        picture.save(unfinished, format="PNG")
