"""Model folders that appear complete or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder on the same disk, which becomes `folder` at the end unless something was raised; if `folder`
    is there and empty, all in the temporary one moves into it.

    Raises:
        FileExistsError: `folder` is there and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} must be a new or an empty folder")
    # What is there stays: it may be a link, another disk's, or where the caller's shell is.
    home = folder if folder.exists() else folder.parent
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=home) as temporary:
        work = Path(temporary) / "folder"
        work.mkdir()
        yield work
        if home == folder:
            # What says that a folder is a model comes last.
            for part in sorted(work.iterdir(), key=lambda part: part.suffix == ".json"):
                part.rename(folder / part.name)
        else:
            work.rename(folder)
