"""`puma demo`: a web page to draw, edit, reconstruct and ask with a model."""

import argparse

from .web import add_web_options, run_app

PORT = 7860


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("demo", help="a web page to try a model on", description=__doc__)
    add_web_options(parser, PORT)


def run(args: argparse.Namespace) -> None:
    run_app(args, "web_page", "the page is at")
