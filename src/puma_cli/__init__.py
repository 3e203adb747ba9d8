"""`puma` on the command line. One module per command, each with `add_parser` and `run`.

A package beside the two libraries, because importing either of them imports torch: `puma --help`, and whatever is
wrong with a command, answers without that wait. So a command's module imports the libraries inside `run`, once files,
folders and options are known to be good.
"""

import argparse
import logging
import sys
import warnings
from importlib.metadata import version

from . import ask, convert, demo, eval, generate, info, init, reconstruct, serve
from .errors import UserError, one_line

COMMANDS = {
    "generate": generate,
    "reconstruct": reconstruct,
    "ask": ask,
    "convert": convert,
    "init": init,
    "info": info,
    "eval": eval,
    "demo": demo,
    "serve": serve,
}


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, as every other mistake of a user's is."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


class _Version(argparse.Action):
    """Looks the version up only where it is asked for: a source tree that is not installed has none."""

    def __call__(self, parser: argparse.ArgumentParser, *_):
        print(f"{parser.prog} {version('puma-hub')}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="puma", description="Pictures and answers with PUMA.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the installed version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS.values():
        command.add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command; `argv` without the program's name, by default this process's.

    Returns:
        0, or 2 after a mistake of the user's, which is one line on stderr: `ValueError` and `OSError`, as both
        libraries raise them for bad input. Any other exception is a fault of the program and is not caught.
    """
    try:
        args = build_parser().parse_args(argv)
        with warnings.catch_warnings():
            # Of the libraries that commands import; what matters to a user is raised.
            warnings.simplefilter("ignore")
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
            COMMANDS[args.command].run(args)
    except (ValueError, OSError) as error:
        print(f"puma: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0
