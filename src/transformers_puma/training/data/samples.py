"""Samples on their way from files to rows: the one form that all sources are read into, and the broken ones.

A sample is a dict with the columns of `SAMPLE_FEATURES`, pictures still encoded: cheap to hold, to shuffle and to mix.
"""

import hashlib
import io
import json
import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Features, List, Value
from PIL import Image

from ...boxes_puma import MARKUP
from ...pictures import as_rgb

logger = logging.getLogger(__name__)

# `content` is JSON; what it holds depends on the kind of the source (see `rows.py`).
SAMPLE_FEATURES = Features(
    {
        "source": Value("string"),
        "key": Value("string"),
        "images": List({"bytes": Value("binary"), "path": Value("string")}),
        "content": Value("string"),
    }
)

Sample = dict[str, Any]


class BrokenSampleError(ValueError):
    """One sample cannot be used: a picture cut short, a missing field, a box without an area."""


class TooManyBrokenSamplesError(RuntimeError):
    """More than the set share of a source's samples are broken: the data, or the way that they are read, is wrong."""


class SampleCounter:
    """Counts a source's samples and its broken ones, and names those in the log.

    Each process (each DataLoader worker too) counts what it reads itself, from the time that it starts.

    Args:
        source: name for the messages.
        max_broken_share: more broken samples than this share of those read raise.
        min_samples: how many are read before that share is looked at.
    """

    def __init__(self, source: str, max_broken_share: float = 0.05, min_samples: int = 1000):
        if not 0 <= max_broken_share <= 1:
            raise ValueError(f"max_broken_share must be between 0 and 1, got {max_broken_share}")
        if min_samples < 1:
            raise ValueError(f"min_samples must be at least 1, got {min_samples}")
        self.source, self.max_broken_share, self.min_samples = source, max_broken_share, min_samples
        self.read = self.broken = 0

    def __deepcopy__(self, memo: dict) -> "SampleCounter":
        # `interleave_datasets` copies its streams; the counts of one source stay together.
        return self

    def skip_if_broken(self, place: str, make: Callable[..., list], *args: Any, uncounted: bool = False) -> list:
        """What `make(*args)` returns, or nothing if it finds the sample broken.

        Args:
            uncounted: the sample is not among those read yet, and what `make` returns is not counted here.

        Raises:
            TooManyBrokenSamplesError: with this one, more than the allowed share are broken.
        """
        try:
            return make(*args)
        except BrokenSampleError as error:
            self.read += uncounted
            self.broken += 1
            counts = f"{self.broken} of {self.read} samples broken"
            logger.warning("%s: skipped %s: %s (%s)", self.source, place, error, counts)
            if self.read >= self.min_samples and self.broken > self.max_broken_share * self.read:
                raise TooManyBrokenSamplesError(
                    f"{self.source}: {counts}, more than the allowed share of {self.max_broken_share:g}; "
                    f"the last one is {place}: {error}"
                ) from error
            return []


def make_sample(key: str, content: dict, images: Sequence[dict] = ()) -> Sample:
    """A sample without its source's name; images as `stored_image` and `image_file` give them."""
    return {"key": key, "images": list(images), "content": json.dumps(content)}


def stored_image(image: dict | bytes | None, name: str) -> dict:
    """A picture that the files hold in themselves; `name` is the field's, for the message.

    Raises:
        BrokenSampleError: the field is empty.
    """
    if isinstance(image, dict):
        image = image["bytes"]
    if not image:
        raise BrokenSampleError(f"no picture in the field {name!r}")
    return {"bytes": image, "path": None}


def image_file(folder: Path, path: str) -> dict:
    """A picture file of an annotation, read only when its row is made."""
    return {"bytes": None, "path": str(folder / path)}


def field(record: dict, name: str, kind: type = str) -> Any:
    """A field of a record.

    Raises:
        BrokenSampleError: missing, null, empty, not of that type, or text that is no Unicode; or no record.
    """
    if not isinstance(record, dict):
        raise BrokenSampleError(f"what should hold {name!r} must be a JSON object, got a {type(record).__name__}")
    value = record.get(name)
    if value is None or value in ("", []):
        raise BrokenSampleError(f"the field {name!r} is missing or empty")
    if not isinstance(value, kind):
        raise BrokenSampleError(f"the field {name!r} must be a {kind.__name__}, got a {type(value).__name__}")
    if kind is str:
        try:
            value.encode()
        except UnicodeEncodeError as error:  # half of an emoji, of which JSON knows nothing
            raise BrokenSampleError(f"the field {name!r} is no Unicode: {error}") from error
    return value


def plain(text: str) -> str:
    """A text from the data, in which nothing is the markup of training rows."""
    while MARKUP.search(text):  # taking out one mark may join the halves of another
        text = MARKUP.sub("", text)
    return text.strip()


def text_field(record: dict, name: str) -> str:
    """A text field of a record, as `plain`.

    Raises:
        BrokenSampleError: missing, not a text, or nothing but space and markup.
    """
    return field({name: plain(field(record, name))}, name)


def sample_rng(seed: int, key: str, purpose: str) -> random.Random:
    """Random numbers that depend on the sample alone, whatever order, process or worker reads it."""
    digest = hashlib.blake2b(f"{seed}\n{purpose}\n{key}".encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


def open_image(image: dict, min_size: int = 1) -> Image.Image | None:
    """The picture as `as_rgb` gives it; None if its shorter side is under `min_size` pixels.

    Raises:
        BrokenSampleError: no such file, not a picture, or one that is cut short.
    """
    try:
        with Image.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])) as opened:
            if min(opened.size) < min_size:
                return None
            return as_rgb(opened)
    except Exception as error:  # the decoders raise errors of all kinds on damaged files
        raise BrokenSampleError(f"unreadable picture: {error}") from error
