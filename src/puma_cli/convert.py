"""`puma convert`: the decoders that PUMA's authors released, as a model folder."""

import argparse
import logging
from pathlib import Path

from .errors import UserError


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "convert", help="the authors' released decoders as a model folder", description=__doc__
    )
    parser.add_argument("source", metavar="SRC", help="download of LucasFang/PUMA from the Hub, with ckpts/ in it")
    parser.add_argument("target", metavar="DST", help="model folder to make; new or empty")


def run(args: argparse.Namespace) -> None:
    if not Path(args.source).is_dir():
        raise UserError(f"no such folder: {args.source}")
    target = Path(args.target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already: the target must be a new or an empty folder")

    from diffusers_puma import convert_released_decoders

    from .loading import quiet_libraries

    progress = logging.StreamHandler()
    logger = logging.getLogger("diffusers_puma.conversion")
    logger.addHandler(progress)
    logger.setLevel(logging.INFO)
    try:
        with quiet_libraries():
            convert_released_decoders(args.source, target)
    finally:
        logger.removeHandler(progress)
    print(target)
