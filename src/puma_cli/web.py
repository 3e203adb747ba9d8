"""What `serve` and `demo` share: their options, and running an application with a model on an address."""

import argparse
import socket
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING

from .errors import UserError
from .model_source import ModelSource, find_model
from .options import add_model_options

if TYPE_CHECKING:
    from diffusers_puma import PumaPipeline


def add_web_options(parser: argparse.ArgumentParser, port: int) -> None:
    group = parser.add_argument_group("address")
    group.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, which only this machine reaches")
    group.add_argument(
        "--port", type=_port, default=port, metavar="N", help=f"default: {port}; 0 for any that is free"
    )
    add_model_options(parser)


def run_app(args: argparse.Namespace, module: str, what: str) -> None:
    """Serves `build_app(pipe, name)` of a module of this package until it is interrupted, having printed `what` with
    its address."""
    model = find_model(args.model)
    model.require_decoders()
    with _take_address(args.host, args.port) as listener:
        try:
            import uvicorn

            build_app = import_module(f".{module}", __package__).build_app
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is not installed: pip install 'puma-hub[{args.command}]'") from error
        app = build_app(_load(args, model), model.name)
        listener.listen()
        print(f"{what} http://{_address(*listener.getsockname()[:2])}", flush=True)
        with suppress(KeyboardInterrupt):  # how a user ends it
            uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def _take_address(host: str, port: int) -> socket.socket:
    """Before the model is loaded, so that a mistake shows at once; connections are refused until it is.

    Raises:
        UserError: an address that another program listens on, or none of this machine's.
    """
    taken = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
        return taken
    except OSError as error:
        taken.close()
        raise UserError(f"cannot listen on {_address(host, port)}: {error.strerror or error}") from error


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _load(args: argparse.Namespace, model: ModelSource) -> "PumaPipeline":
    """The pipeline with all decoders, without progress bars: a server's log is no place for them."""
    from .loading import load_pipeline

    pipe = load_pipeline(model, model.decoders, args.device, args.dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {2**16 - 1}, got {text!r}")
    return int(text)
