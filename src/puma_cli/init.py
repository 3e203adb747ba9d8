"""`puma init`: a trainable model folder from a language model, an encoder and decoders."""

import argparse
from pathlib import Path

from .errors import UserError


def add_parser(subparsers: argparse._SubParsersAction) -> None:
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


def run(args: argparse.Namespace) -> None:
    if Path(args.out).exists() and (not Path(args.out).is_dir() or any(Path(args.out).iterdir())):
        raise UserError(f"the output must be a new or an empty folder: {args.out}")

    from diffusers_puma.initialization import initialize_puma

    from .loading import quiet_libraries

    try:
        with quiet_libraries():
            report = initialize_puma(args.llm, args.vision, args.decoders, args.out)
    except ModuleNotFoundError as error:
        raise UserError(str(error)) from error
    print(report)
