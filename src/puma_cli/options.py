"""Options that several commands share, and their types."""

import argparse
import math
from typing import Any

from .errors import UserError, shown

NUM_SCALES = 5
MAX_SEED = 2**63 - 1
MAX_NEW_TOKENS = 128  # of an answer, where neither user nor model says


Scale = int | str | list[tuple[float, int]]


def scale(text: str) -> int | str:
    """0 (finest) .. 4 (coarsest), or `all`."""
    return _scale(text, ("all",))


def scale_or_schedule(text: str) -> Scale:
    """As `scale`, or a schedule `3:0.4,0`: scale 3 up to 0.4 of the steps, then scale 0."""
    return _schedule(text) if "," in text else scale(text)


def scale_schedule_or_best(text: str) -> Scale:
    """As `scale_or_schedule`, or `best`."""
    return _schedule(text) if "," in text else _scale(text, ("all", "best"))


def _schedule(text: str) -> list[tuple[float, int]]:
    *parts, last = [part.partition(":")[::2] for part in text.split(",")]
    if not all(until for _, until in parts):
        raise argparse.ArgumentTypeError(
            "a schedule names each scale but the last with the part of the steps up to which it draws, as in 3:0.4,0, "
            f"got {shown(text)}"
        )
    schedule = [(number(until), _scale(scale, ())) for scale, until in parts]
    schedule.append((number(last[1] or "1"), _scale(last[0], ())))
    untils = [0.0, *(until for until, _ in schedule)]
    if untils[-1] != 1 or any(a >= b for a, b in zip(untils, untils[1:], strict=False)):
        raise argparse.ArgumentTypeError(f"parts of the steps must rise to 1, as in 3:0.4,0, got {shown(text)}")
    return schedule


def _scale(text: str, words: tuple[str, ...]) -> int | str:
    if text in words:
        return text
    if text.isascii() and text.isdigit() and int(text) < NUM_SCALES:
        return int(text)
    expected = " or ".join([f"0 (finest) to {NUM_SCALES - 1} (coarsest)", *words])
    raise argparse.ArgumentTypeError(f"must be {expected}, got {shown(text)}")


def check_best(scale: Any, prompt: str | None, pictures: list) -> None:
    """Raises `UserError` for `best` without words to rank by, or with pictures, whose prompt is no caption."""
    if scale == "best" and (pictures or not (prompt or "").strip()):
        raise UserError("scale best ranks pictures by how well they fit a caption: it takes words, and no picture")


def positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= MAX_SEED):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {MAX_SEED}, got {text!r}")
    return int(text)


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number, got {shown(text)}")
    return value


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help="model folder, or its name on the Hub (default: the small model of the checkout)",
    )
    group.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is a GPU")
    group.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="number format to compute in (default: float32 on the CPU, float16 on a GPU)",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="of the noise that pictures start from (0)")
    group.add_argument("--steps", type=positive, metavar="N", help="denoising steps (default: the model's own)")
    group.add_argument(
        "--guidance", type=number, metavar="G", help="strength of guidance, 1 for none (default: the pipeline's)"
    )


def add_output_option(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "-o",
        "--output",
        default=default,
        metavar="OUT.png",
        help=f"PNG to write, replaced if it is there (default {default}); `--scale all` also writes OUT_0.png ..",
    )
