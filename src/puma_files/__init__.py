"""What the configs and weight files of a model folder say, and what is wrong with them; and files written whole.

A package of its own, without torch: importing one of the libraries imports it, which `puma info` does not wait for.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten
from typing import Any

from safetensors import SafetensorError, safe_open


def read_json(file: Path) -> dict[str, Any]:
    """A config or an index.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or not an object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, found a {type(content).__name__}")
    return content


def read_safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    """`dtype`, `shape` and `data_offsets` of each tensor by its name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or one that was cut off, such as the pointer that git leaves without LFS.
    """
    try:
        # Compares the header with the file's length too.
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        hint = "it may be cut off, or the pointer that git leaves without LFS"
        raise ValueError(f"{file} is no complete safetensors file ({error}): {hint}") from error
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    header.pop("__metadata__", None)
    return header


def shard_files(index: Path) -> list[Path]:
    """The files that an index of weights in shards names.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: not an index, or one of files outside of its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} is no index of weights: it has no weight_map")
    names = [Path(name) for name in sorted(set(weight_map.values()))]
    outside = [name for name in names if name.is_absolute() or ".." in name.parts]
    if outside:
        raise ValueError(f"{index} must name files of its own folder, found {outside[0]}")
    files = [index.parent / name for name in names]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, but {index.name} names it")
    return files


def unreadable(error: Exception) -> str:
    """Why weights cannot be read, in a line, of the error of a library."""
    if isinstance(error, UnpicklingError):
        # torch's own message is advice on how to run what is in there.
        return "it holds something else than tensors"
    return shorten(f"{type(error).__name__}: {error}", 300)


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A name beside `file` to write to: what is there at the end becomes `file`, and nothing after an error.

    Two processes that write the same file end with one of both. The name does not end as `file` does, so that no
    pattern such as `*.png` finds it: a library that takes the format of the name is to be told it.
    """
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield unfinished
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
