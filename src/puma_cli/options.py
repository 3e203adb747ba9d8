"""Options that several commands share, and their types."""

import argparse
import math

NUM_SCALES = 5
MAX_SEED = 2**63 - 1


def scale(text: str) -> int | str:
    """0 (finest) .. 4 (coarsest), or `all`."""
    return _scale(text, ("all",))


def scale_or_best(text: str) -> int | str:
    """As `scale`, or `best`."""
    return _scale(text, ("all", "best"))


def _scale(text: str, words: tuple[str, ...]) -> int | str:
    if text in words:
        return text
    if text.isascii() and text.isdigit() and int(text) < NUM_SCALES:
        return int(text)
    expected = f"0 (finest) to {NUM_SCALES - 1} (coarsest), {' or '.join(words)}"
    raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")


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
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}")
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
