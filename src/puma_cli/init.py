"""`puma init`: a trainable model folder from a language model, an encoder and decoders."""

import argparse
from pathlib import Path

from .errors import UserError
from .folders import check_new_folder, progress_of
from .model_source import HUB_ID


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "init",
        help="assemble a trainable model",
        description="Assemble a trainable model folder from pretrained parts, and say what in it is new.",
    )
    parser.add_argument("--llm", required=True, metavar="DIR_OR_ID", help="decoder-only language model")
    parser.add_argument(
        "--vision",
        required=True,
        metavar="DIR_OR_ID|open_clip:ARCH/TAG",
        help="CLIP encoder, of transformers or open_clip (such as open_clip:ViT-L-14/openai)",
    )
    parser.add_argument(
        "--decoders",
        metavar="DIR_OR_ID",
        help="the released decoders, a PumaPipeline, or a plain SDXL pipeline (default: a language model alone)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make, new or empty")


def check_source(option: str, name: str | None) -> None:
    """Raises `UserError` for what is no folder and cannot be a name on the Hub, before anything is asked there."""
    is_remote = name is None or name.startswith("open_clip:") or HUB_ID.fullmatch(name)
    if not is_remote and not Path(name).is_dir():
        raise UserError(f"{option} {name}: no such model folder")


def run(args: argparse.Namespace) -> None:
    target = check_new_folder(args.out)
    for option, name in (("--llm", args.llm), ("--vision", args.vision), ("--decoders", args.decoders)):
        check_source(option, name)

    from diffusers_puma.initialization import initialize_puma

    try:
        with progress_of("diffusers_puma"):
            report = initialize_puma(args.llm, args.vision, args.decoders, target)
    except ModuleNotFoundError as error:
        # open_clip, which is in an extra; the message says so.
        raise UserError(str(error)) from error
    print(report)
