"""`puma convert`: the decoders that PUMA's authors released, as a model folder."""

import argparse
from pathlib import Path

from .errors import UserError
from .folders import check_new_folder, progress_of


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "convert", help="the authors' released decoders as a model folder", description=__doc__
    )
    parser.add_argument("source", metavar="SRC", help="download of LucasFang/PUMA from the Hub, with ckpts/ in it")
    parser.add_argument("target", metavar="DST", help="model folder to make; new or empty")


def run(args: argparse.Namespace) -> None:
    if not Path(args.source).is_dir():
        raise UserError(f"no such folder: {args.source}")
    target = check_new_folder(args.target)

    from diffusers_puma import convert_released_decoders

    with progress_of("diffusers_puma.conversion"):
        convert_released_decoders(args.source, target)
    print(target)
