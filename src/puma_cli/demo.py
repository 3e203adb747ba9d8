"""`puma demo`: a web page to draw, edit, reconstruct and ask with a model."""

import argparse

from .errors import UserError
from .model_source import find_model
from .web import add_web_options, load_for_web, open_socket, run_app

PORT = 7860


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("demo", help="a web page to try a model on", description=__doc__)
    add_web_options(parser, PORT)


def run(args: argparse.Namespace) -> None:
    model = find_model(args.model)
    model.require_decoders()
    with open_socket(args.host, args.port) as listener:
        try:
            from .web_page import build_app
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is not installed: pip install 'puma-hub[demo]'") from error

        app = build_app(load_for_web(args, model), model.name)
        run_app(app, listener, "the page is at")
