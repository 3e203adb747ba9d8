"""Files as streams of raw records: webdataset tars, parquet, lines of JSON, and JSON files.

Tars and parquet go through the builders of `datasets`. Lines and JSON go through its generator builder instead of its
JSON builder: there, one bad line ends the stream, a file is never cut into several shards, and a JSON file must be a
list of objects of one schema.

A stream is cut into shards, which processes and DataLoader workers share. `num_shards` is how many there should be;
tars have as many as there are files.

A file that cannot be read to its end gives a last record that holds the reason as `error`.
"""

import functools
import glob
import gzip
import io
import json
import os
import random
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import zstandard
from datasets import Features, IterableDataset, Value
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from .samples import BrokenSampleError

Paths = str | os.PathLike | Sequence[str | os.PathLike]
LINE_FEATURES = Features(dict.fromkeys(("record", "key", "place", "error"), Value("string")))
# What reading a file raises where it is cut short or damaged.
CORRUPT = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


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
            searched = f" (in a folder: {', '.join(patterns)})" if patterns else ""
            raise FileNotFoundError(f"no files at {path}{searched}")
        found += sorted(files)
    if seed is not None:
        random.Random(seed).shuffle(found)
    return found


class TarBuilder(WebDataset):
    """The webdataset builder of `datasets`, except that members stay bytes and a tar that is cut short ends there:
    otherwise one member that is no JSON, or one download that broke off, would end the stream."""

    DECODERS = {}

    @classmethod
    def _get_pipeline_from_tar(cls, tar_path: str, tar_iterator: Iterable) -> Iterator[dict[str, Any]]:
        try:
            yield from super()._get_pipeline_from_tar(tar_path, tar_iterator)
        except (tarfile.TarError, *CORRUPT) as error:
            yield {"__key__": "the rest of the file", "__url__": tar_path, "error": str(error)}


def _as_they_are(files: Sequence[str]) -> DataFilesDict:
    """For a builder of `datasets`, which takes paths given otherwise for patterns."""
    return DataFilesDict({"train": DataFilesList(list(files), [(file,) for file in files])})


def picture_stream(files: Sequence[str]) -> IterableDataset:
    """Pictures, undecoded, as `image`."""
    return ImageFolder(data_files=_as_they_are(files), drop_labels=True).as_streaming_dataset("train").decode(False)


def webdataset_stream(files: Sequence[str]) -> IterableDataset:
    """Records of tars: `__key__`, `__url__` and, as bytes or None, `jpg`, `png`, `webp`, `txt` and `json`."""
    members = dict.fromkeys(("jpg", "png", "webp", "txt", "json"), Value("binary"))
    texts = dict.fromkeys(("__key__", "__url__", "error"), Value("string"))
    # With features that are given, the first samples do not decide what members exist.
    return TarBuilder(data_files=_as_they_are(files), features=Features(members | texts)).as_streaming_dataset("train")


def parquet_stream(files: Sequence[str], num_shards: int = 1, features: Features | None = None) -> IterableDataset:
    """Rows of parquet files, pictures undecoded; cut by row groups when there are fewer files than `num_shards`.

    Args:
        features: the columns to read; by default those of the first file, which all must then have.
    """
    columns = None if features is None else list(features)
    builder = Parquet(data_files=_as_they_are(files), features=features, columns=columns)
    stream = builder.as_streaming_dataset("train").decode(False)
    return stream.reshard() if stream.num_shards < num_shards else stream


def line_stream(files: Sequence[str], num_shards: int = 1) -> IterableDataset:
    """Lines of files (`.jsonl`, `.jsonl.zst`, `.jsonl.gz`): `record`, the line; `place`, the file and line number;
    `key`, the same without the file's folder; `error`.

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


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BrokenSampleError: not JSON, or not an object.
    """
    try:
        record = json.loads(text)
    except ValueError as error:
        raise BrokenSampleError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise BrokenSampleError(f"must be a JSON object, got a {type(record).__name__}")
    return record


def parse_record(raw: dict[str, str]) -> dict[str, Any]:
    """The object of a record of `line_stream` or `entry_stream`, see `parse_object`."""
    return parse_object(raw["record"])


def _parts(files: Sequence[str], num_shards: int) -> list[tuple[str, int, int]]:
    """(file, index, step): the shard that reads a file's entries index, index + step, ..."""
    step = -(-num_shards // len(files))
    return [(file, index, step) for file in files for index in range(step)]


def _lines(parts: list[tuple[str, int, int]]) -> Iterator[dict[str, str | None]]:
    for file, index, step in parts:
        number = 0
        try:
            with _open_lines(file) as lines:
                for number, line in enumerate(lines, start=1):
                    if (number - 1) % step == index and line.strip():
                        yield _line(line.rstrip("\n"), file, number)
        except CORRUPT as error:
            yield _line("", file, number + 1, error=str(error))


def _entries(parts: list[tuple[str, int, int]]) -> Iterator[dict[str, str | None]]:
    for file, index, step in parts:
        for key, entry in _load_entries(file)[index::step]:
            yield _line(json.dumps(entry), file, key)


def _line(record: str, file: str, number: int | str, error: str | None = None) -> dict[str, str | None]:
    return {"record": record, "key": f"{Path(file).name}:{number}", "place": f"{file}:{number}", "error": error}


# The parts of one file are read one after another, and a large file is slow to parse.
@functools.lru_cache(maxsize=1)
def _load_entries(file: str) -> list[tuple[str, Any]]:
    with open(file, encoding="utf-8") as opened:
        try:
            entries = json.load(opened)
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
    if isinstance(entries, list):
        return [(str(i), entry) for i, entry in enumerate(entries)]
    if isinstance(entries, dict):
        return [
            (key, entry | {"__key__": key} if isinstance(entry, dict) else entry) for key, entry in entries.items()
        ]
    raise ValueError(f"{file} must hold a JSON list or object, got a {type(entries).__name__}")


def _open_lines(file: str) -> io.TextIOBase:
    # Bytes that are no UTF-8 become U+FFFD: they spoil a line, not the file.
    text = {"encoding": "utf-8", "errors": "replace", "newline": "\n"}
    if file.endswith(".zst"):
        return zstandard.open(file, "rt", **text)
    if file.endswith(".gz"):
        return gzip.open(file, "rt", **text)
    return open(file, **text)
