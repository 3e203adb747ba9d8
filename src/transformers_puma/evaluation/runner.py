"""Runs an evaluation over many samples: in batches, over several processes, and again from where a kill left it.

Knows neither pictures nor questions: a caller's `batch_fn` turns samples into rows of results, and this file decides
who computes which, and keeps them. A run lives in a folder:

    settings.json           what decides the numbers; a folder never mixes two settings
    samples-00000.jsonl ..  one line a sample with its `index`, written by that process (any number of processes)
    arrays-00000.f32 ..     vectors that belong to samples, where an evaluation keeps any (`ArrayFile`)
    results.json            the scores, written once every sample is there

Processes (`torchrun`, `accelerate launch`) do not talk to each other: process r of w takes the samples r, r + w, ...,
and whichever finds all rows in place writes the results. So processes may start, die and restart on their own.

Beside that, what makes numbers repeatable and tells where they are from: seeds of samples, and fingerprints of models
and versions of packages, for the settings and the results.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from tqdm import tqdm

from puma_files import read_safetensors_header, whole_file

Row = dict[str, Any]
BatchFunction = Callable[[list[Any]], list[Row]]

SETTINGS, RESULTS = "settings.json", "results.json"
PACKAGES = ("puma-hub", "torch", "transformers", "diffusers", "torchmetrics", "torch-fidelity", "open-clip-torch")
BLOCK = 2**12  # bytes
# Files of a model's folder that decide what it computes, beside its weights.
MODEL_SETTINGS = (
    "model_index.json",
    "config.json",
    "generation_config.json",
    "scheduler_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
)


@dataclass(frozen=True)
class Shard:
    """This process among those that share a run.

    rank: 0 .. `world_size` - 1.
    """

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Shard":
        """As `torchrun` and `accelerate launch` tell their processes; alone without them."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def sample_seed(seed: int, sample_id: int | str) -> int:
    """The seed of one sample's noise: depends on nothing else, so on no batch, no order and no number of processes."""
    digest = hashlib.sha256(f"{seed}/{sample_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def run_samples(
    samples: Sequence[Any],
    batch_fn: BatchFunction,
    folder: str | Path,
    *,
    settings: Mapping[str, Any],
    batch_size: int = 1,
    description: str = "",
    shard: Shard | None = None,
) -> list[Row] | None:
    """Computes the rows that `folder` lacks.

    Args:
        samples: read by index, each only by the process that computes it.
        batch_fn: at most `batch_size` samples -> as many rows, dicts that JSON can hold. A row's values may depend on
            its own sample only.
        folder: of the run; made if it is not there.
        settings: all that decides the numbers (model, data, seeds, steps, ...), of values that JSON can hold. Neither
            the batch size nor the number of samples belongs here: a longer run goes on from a shorter one.
        batch_size: samples in one call of `batch_fn`.
        description: of the progress bar, which process 0 shows.
        shard: default that of the environment.

    Returns:
        All rows in the order of the samples, each with its `index`; None if other processes are still at work.

    Raises:
        ValueError: no samples, or a folder that holds a run with other settings.
    """
    if not len(samples):
        raise ValueError("there are no samples to evaluate")
    folder, shard = Path(folder), shard or Shard.from_environment()
    claim_folder(folder, settings)
    file = folder / f"samples-{shard.rank:05d}.jsonl"
    drop_unfinished_line(file)
    done = {row["index"] for row in read_rows(folder)}
    mine = range(shard.rank, len(samples), shard.world_size)
    todo = [index for index in mine if index not in done]
    bar = tqdm(desc=description, total=len(mine), initial=len(mine) - len(todo), unit="sample", disable=shard.rank > 0)
    with bar, file.open("ab") as stream:
        for start in range(0, len(todo), batch_size):
            indices = todo[start : start + batch_size]
            rows = batch_fn([samples[index] for index in indices])
            if len(rows) != len(indices):
                raise ValueError(f"batch_fn returned {len(rows)} rows for {len(indices)} samples")
            lines = [
                json.dumps({"index": index, **row}, allow_nan=False) for index, row in zip(indices, rows, strict=True)
            ]
            stream.write("".join(f"{line}\n" for line in lines).encode())
            stream.flush()
            bar.update(len(indices))
    rows = {row["index"]: row for row in read_rows(folder)}
    if any(index not in rows for index in range(len(samples))):
        return None
    return [rows[index] for index in range(len(samples))]


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder of a run, or checks that it is of the same run.

    Raises:
        ValueError: naming the first setting that differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SETTINGS
    settings = json.loads(json.dumps(dict(settings)))
    if not file.exists():
        write_json(file, settings)
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    for name in sorted({*before, *settings}):
        if before.get(name) != settings.get(name):
            raise ValueError(
                f"{folder} holds a run with {name} = {before.get(name)!r}, and this one has {settings.get(name)!r}: "
                "choose another folder, or remove that one"
            )


def model_settings(model: str) -> dict[str, Any]:
    """Which model a run is of: its name, and of a folder its weights, of a model on the Hub its commit."""
    return {"model": model, "weights": weights_fingerprint(model) if Path(model).is_dir() else _cached_commit(model)}


def weights_fingerprint(folder: str | Path) -> str:
    """Of weights and settings below a model's folder, so that a run does not go on with what was made of them since.

    Reads the settings, and of the weights names, shapes and three blocks of each tensor, which takes no time for any
    number of gigabytes. Training may leave most tensors of a file alone.
    """
    digest, folder = hashlib.sha256(), Path(folder)
    for file in sorted(folder.rglob("*.safetensors")):
        header = read_safetensors_header(file)
        digest.update(f"{file.relative_to(folder).as_posix()} {json.dumps(header)} ".encode())
        spans = [tensor["data_offsets"] for tensor in header.values()]
        start_of_data = file.stat().st_size - max((end for _, end in spans), default=0)
        with file.open("rb") as stream:
            for start, end in spans:
                for place in (start, (start + end) // 2, max(start, end - BLOCK)):
                    stream.seek(start_of_data + place)
                    digest.update(stream.read(min(BLOCK, end - place)))
    for file in sorted(file for name in MODEL_SETTINGS for file in folder.rglob(name)):
        digest.update(f"{file.relative_to(folder).as_posix()} ".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _cached_commit(model: str) -> str | None:
    """The commit of a model on the Hub that was loaded; None for any other name."""
    try:
        files = [try_to_load_from_cache(model, name) for name in ("model_index.json", "config.json")]
    except HFValidationError:
        return None
    return next((Path(file).parent.name for file in files if isinstance(file, str)), None)


def drop_unfinished_line(file: Path) -> None:
    """Cuts off what a kill left of a last line."""
    if file.exists():
        content = file.read_bytes()
        os.truncate(file, content.rfind(b"\n") + 1)


def read_rows(folder: Path) -> Iterator[Row]:
    """The finished rows of all processes of a run, in no order; a line that is still being written is left out."""
    for file in sorted(Path(folder).glob("samples-*.jsonl")):
        for line in file.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                yield json.loads(line)


def write_json(file: Path, content: Any) -> None:
    """Writes a whole file or none."""
    with whole_file(file) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


class ArrayFile:
    """Vectors beside the rows of a run, for scores that need all samples at once, such as FID.

    `append` a vector, and keep what it returns in the sample's row: a vector is on disk before its row is, so each
    row that is there has its vector.
    """

    def __init__(self, folder: str | Path, shard: Shard | None = None) -> None:
        shard = shard or Shard.from_environment()
        self.file = Path(folder) / f"arrays-{shard.rank:05d}.f32"

    def append(self, vector: np.ndarray) -> dict[str, Any]:
        """Keeps a vector (n,) in float32. Returns where it lies, for `read_arrays`."""
        data = np.ascontiguousarray(vector, dtype="<f4")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab") as stream:
            offset = stream.tell()
            stream.write(data.tobytes())
        return {"file": self.file.name, "offset": offset, "length": len(data)}


def read_arrays(folder: str | Path, places: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Vectors (len(places), n) that `ArrayFile.append` put at these places."""
    maps = {name: np.memmap(Path(folder) / name, "u1", "r") for name in {place["file"] for place in places}}
    parts = [maps[p["file"]][p["offset"] : p["offset"] + 4 * p["length"]].view("<f4") for p in places]
    return np.stack(parts)


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers can depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_results(
    folder: str | Path,
    *,
    task: str,
    scores: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    num_samples: int,
    **more: Any,
) -> Path:
    """Writes `results.json`, which `puma eval compare` reads.

    Args:
        task: such as "reconstruction"; for a benchmark its name.
        scores: `{row: {metric: {"mean", "low", "high", "n"}}}` with a row for each scale or category; a score without
            samples of its own (FID) has `mean` alone.
        settings: those of the run.
        more: further fields.

    Returns:
        The file's path.
    """
    file = Path(folder) / RESULTS
    results = {"task": task, "num_samples": num_samples, "scores": scores, **more}
    write_json(file, {**results, "settings": dict(settings), "versions": versions()})
    return file
