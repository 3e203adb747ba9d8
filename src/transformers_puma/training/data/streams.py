"""Files as streams of raw records: webdataset tars, parquet, image folders, lines of text, and JSON files.

Tars, parquet and image folders go through the builders of `datasets`. Lines and JSON go through its generator builder
instead of its text and JSON builders: there, one bad line ends the stream, a file is never cut into several shards,
and a JSON file must be a list of objects of one schema.

A stream is cut into shards, which processes and DataLoader workers share. `num_shards` is how many there should be;
tars and image folders have as many as there are files.
"""

import functools
import glob
import gzip
import io
import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Features, Image, IterableDataset, Json, Value, load_dataset

from .samples import BrokenSampleError

Paths = str | os.PathLike | Sequence[str | os.PathLike]
LINE_FEATURES = Features({"record": Value("string"), "key": Value("string"), "place": Value("string")})


def find_files(paths: Paths, patterns: Sequence[str], seed: int | None = None) -> list[str]:
    """Files that paths name, sorted, or in the seed's order.

    Args:
        paths: files, folders and glob patterns.
        patterns: what to look for in a folder, recursively.

    Raises:
        FileNotFoundError: a path that names nothing.
    """
    found = []
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        path = os.fspath(path)
        if os.path.isdir(path):
            files = {os.fspath(file) for pattern in patterns for file in Path(path).rglob(pattern)}
        else:
            files = {path} if os.path.exists(path) else set(glob.glob(path, recursive=True))
        if not files:
            raise FileNotFoundError(f"no files at {path} (a folder is searched for {', '.join(patterns)})")
        found += sorted(files)
    if seed is not None:
        random.Random(seed).shuffle(found)
    return found


def webdataset_stream(files: Sequence[str]) -> IterableDataset:
    """Records of tars: `__key__`, `__url__`, undecoded pictures (`jpg`, `png`, `webp`), `txt` and `json`; None for
    what a sample does not have."""
    images = {extension: Image(decode=False) for extension in ("jpg", "png", "webp")}
    texts = {"txt": Value("string"), "json": Json(), "__key__": Value("string"), "__url__": Value("string")}
    # Given the features, the builder does not demand that the first samples of a tar all have the same members.
    return load_dataset(
        "webdataset", data_files=list(files), split="train", streaming=True, features=Features(images | texts)
    )


def parquet_stream(files: Sequence[str], num_shards: int = 1) -> IterableDataset:
    """Rows of parquet files, pictures undecoded; cut by row groups when there are fewer files than `num_shards`."""
    stream = load_dataset("parquet", data_files=list(files), split="train", streaming=True).decode(False)
    return stream.reshard() if stream.num_shards < num_shards else stream


def line_stream(files: Sequence[str], num_shards: int = 1) -> IterableDataset:
    """Lines of files (`.jsonl`, `.jsonl.zst`, `.jsonl.gz`): `record`, the line; `place`, the file and line number; and
    `key`, the same without the file's folder.

    With fewer files than `num_shards`, several shards read the same file, each its every n-th line.
    """
    return IterableDataset.from_generator(
        _lines, features=LINE_FEATURES, gen_kwargs={"parts": _parts(files, num_shards)}
    )


def entry_stream(files: Sequence[str], num_shards: int = 1) -> IterableDataset:
    """Entries of JSON files that hold one list or one object: as `line_stream`, each entry as JSON of its own.

    The entries of an object get its key as `"__key__"`. A file is parsed as a whole by each process that reads it.
    """
    return IterableDataset.from_generator(
        _entries, features=LINE_FEATURES, gen_kwargs={"parts": _parts(files, num_shards)}
    )


def record_stream(files: Sequence[str], num_shards: int = 1) -> IterableDataset:
    """`entry_stream` for `.json`, else `line_stream`."""
    if all(file.endswith(".json") for file in files):
        return entry_stream(files, num_shards)
    if any(file.endswith(".json") for file in files):
        raise ValueError(f"either .json files or files of JSON lines, not both: {', '.join(files)}")
    return line_stream(files, num_shards)


def parse_record(raw: dict[str, str]) -> dict[str, Any]:
    """The object in a line.

    Raises:
        BrokenSampleError: not JSON, or not an object.
    """
    try:
        record = json.loads(raw["record"])
    except ValueError as error:
        raise BrokenSampleError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise BrokenSampleError(f"must be a JSON object, got a {type(record).__name__}")
    return record


def _parts(files: Sequence[str], num_shards: int) -> list[tuple[str, int, int]]:
    """(file, index, step): the shard that reads a file's entries index, index + step, ..."""
    step = -(-num_shards // len(files))
    return [(file, index, step) for file in files for index in range(step)]


def _lines(parts: list[tuple[str, int, int]]) -> Iterator[dict[str, str]]:
    for file, index, step in parts:
        with _open_lines(file) as lines:
            for number, line in enumerate(lines):
                if number % step == index and line.strip():
                    yield _line(line.rstrip("\n"), file, number + 1)


def _entries(parts: list[tuple[str, int, int]]) -> Iterator[dict[str, str]]:
    for file, index, step in parts:
        for key, entry in _load_entries(file)[index::step]:
            yield _line(json.dumps(entry), file, key)


def _line(record: str, file: str, number: int | str) -> dict[str, str]:
    return {"record": record, "key": f"{Path(file).name}:{number}", "place": f"{file}:{number}"}


@functools.lru_cache(maxsize=1)
def _load_entries(file: str) -> list[tuple[str, Any]]:
    with open(file, encoding="utf-8") as opened:
        entries = json.load(opened)
    if isinstance(entries, list):
        return [(str(i), entry) for i, entry in enumerate(entries)]
    if isinstance(entries, dict):
        return [
            (key, entry | {"__key__": key} if isinstance(entry, dict) else entry) for key, entry in entries.items()
        ]
    raise ValueError(f"{file} must hold a JSON list or object, got a {type(entries).__name__}")


def _open_lines(file: str) -> io.TextIOBase:
    # Undecodable bytes become U+FFFD: they spoil a line, not the file.
    if file.endswith(".zst"):
        import zstandard

        return zstandard.open(file, "rt", encoding="utf-8", errors="replace", newline="\n")
    if file.endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8", errors="replace", newline="\n")
    return open(file, encoding="utf-8", errors="replace", newline="\n")
