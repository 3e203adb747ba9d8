"""What the commands that make a model folder share."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError


def check_new_folder(folder: str) -> Path:
    """The path of a folder to make; to be called before any work is done for it.

    Raises:
        UserError: something is there that is not an empty folder.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is there already: the target must be a new or an empty folder")
    return path


@contextmanager
def progress_of(module: str) -> Iterator[None]:
    """Shows on stderr what a module of the library logs about its progress. Other libraries keep quiet."""
    from .loading import quiet_libraries

    handler = logging.StreamHandler()
    logger = logging.getLogger(module)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with quiet_libraries():
            yield
    finally:
        logger.removeHandler(handler)
