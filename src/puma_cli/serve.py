"""`puma serve`: pictures and answers over HTTP, in OpenAI's protocol, which its clients in every language speak."""

import argparse

from .errors import UserError
from .model_source import find_model
from .web import add_web_options, load_for_web, open_socket, run_app

PORT = 8000


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "serve", help="pictures and answers over HTTP, in OpenAI's protocol", description=__doc__
    )
    add_web_options(parser, PORT)


def run(args: argparse.Namespace) -> None:
    model = find_model(args.model)
    model.require_decoders()
    with open_socket(args.host, args.port) as listener:
        try:
            from .server import build_app
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is not installed: pip install 'puma-hub[serve]'") from error

        app = build_app(load_for_web(args, model), model.name)
        run_app(app, listener, "serving")
