"""`puma serve`: pictures and answers over HTTP, in OpenAI's protocol, which its clients in every language speak."""

import argparse

from .web import add_web_options, run_app

PORT = 8000


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "serve", help="pictures and answers over HTTP, in OpenAI's protocol", description=__doc__
    )
    add_web_options(parser, PORT)


def run(args: argparse.Namespace) -> None:
    run_app(args, "server", "serving")
