"""Pictures, captions and edits to evaluate on, read one by one and in a fixed order.

Every set is put in an order that depends on its ids alone, so that the first N are a random but fixed part of it, the
same on every machine; ImageNet's own order would begin with one class.
"""

import hashlib
import json
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from transformers_puma.pictures import as_rgb

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
CAPTION_COLUMNS = ("caption", "prompt", "text", "captions")
COCO_CAPTIONS = "captions_val2014.json"
COCO_SUBSET = 30_000
SampleId = int | str


@dataclass(frozen=True)
class Samples(Sequence):
    """Samples that are read when they are asked for: dicts with their `id` and what `read` gives.

    source: where they come from, for the settings of a run.
    """

    ids: list[SampleId]
    read: Callable[[SampleId], dict[str, Any]]
    source: dict[str, Any]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": self.ids[index], **self.read(self.ids[index])}

    def first(self, count: int | None) -> "Samples":
        """The first `count`; all for None or where there are no more."""
        return Samples(self.ids[:count], self.read, self.source)


def fixed_order(ids: list[SampleId]) -> list[SampleId]:
    """Shuffled by a hash of each id."""
    return sorted(ids, key=lambda item: hashlib.sha256(str(item).encode()).digest())


def open_pictures(path: str | Path, split: str | None = None) -> Samples:
    """Pictures as samples with an `image`.

    Args:
        path: a folder of picture files, searched to the bottom (ImageNet's validation folder); a parquet file or a
            folder of them with an `image` column (ImageNet as the Hub has it); or a folder of `save_to_disk`.
        split: of a data set with several.
    """
    path = Path(path)
    if _is_table(path):
        table = open_table(path, split)
        column = _column(table, ("image",), path)
        return _table_samples(table, path, split, lambda row: {"image": as_rgb(row[column])}, [column])
    if not path.is_dir():
        raise ValueError(f"no such folder or parquet file: {path}")
    files = [file.relative_to(path) for file in path.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES]
    if not files:
        suffixes = ", ".join(sorted(PICTURE_SUFFIXES))
        raise ValueError(f"{path} holds no pictures ({suffixes}), no parquet files and no data set")
    ids = fixed_order([file.as_posix() for file in files])
    return Samples(ids, lambda name: {"image": read_picture(path / name)}, _source(path, split, len(ids)))


def open_captions(path: str | Path, split: str | None = None, template: str | None = None) -> Samples:
    """Captions as samples with a `prompt`, and the true `image` where there is one.

    Args:
        path: COCO 2014 (a folder with `captions_val2014.json`, there or in `annotations`, and `val2014`), or a table
            as for `open_pictures` with a column of captions; its true pictures are in the column `image` or `target`.
        split: of a data set with several.
        template: how a prompt is made of a row's columns, such as `"{name} in {style} style"`; by default it is the
            column `caption`, `prompt` or `text`, of a list its first item.
    """
    path = Path(path)
    if _is_table(path):
        return _captions_of_table(path, split, template)
    found = [file for file in (path / COCO_CAPTIONS, path / "annotations" / COCO_CAPTIONS) if file.is_file()]
    if not found:
        raise ValueError(f"{path} holds neither {COCO_CAPTIONS} (of COCO 2014) nor a data set with captions")
    return _coco(found[0], path / "val2014")


def _coco(annotations: Path, pictures: Path) -> Samples:
    """The 30,000 of COCO: pictures in `fixed_order` of their ids, each with its caption of lowest id.

    The report does not say which 30,000 of the 202,654 captions it takes. One of each picture keeps the true pictures
    of FID distinct.
    """
    content = json.loads(annotations.read_text(encoding="utf-8"))
    files = {image["id"]: image["file_name"] for image in content["images"]}
    captions: dict[int, str] = {}
    for annotation in sorted(content["annotations"], key=lambda item: item["id"]):
        captions.setdefault(annotation["image_id"], annotation["caption"].strip())
    ids = fixed_order(list(captions))[:COCO_SUBSET]

    def read(image_id: int) -> dict[str, Any]:
        return {"prompt": captions[image_id], "image": read_picture(pictures / files[image_id])}

    return Samples(ids, read, _source(annotations, None, len(ids)))


def _captions_of_table(path: Path, split: str | None, template: str | None) -> Samples:
    table = open_table(path, split)
    if template is None:
        columns = [_column(table, CAPTION_COLUMNS, path)]
    else:
        columns = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        for column in columns:
            _column(table, (column,), path)
    picture = next((name for name in ("image", "target") if name in table.column_names), None)

    def read(row: dict[str, Any]) -> dict[str, Any]:
        value = row[columns[0]] if template is None else template.format(**row)
        sample = {"prompt": value if isinstance(value, str) else value[0]}
        return sample if picture is None else {**sample, "image": as_rgb(row[picture])}

    samples = _table_samples(table, path, split, read, columns if picture is None else [*columns, picture])
    return Samples(samples.ids, samples.read, {**samples.source, "template": template})


def open_edits(path: str | Path, split: str | None = None) -> Samples:
    """Edits as samples with a source `image`, the instruction as `prompt`, and `caption` (of the target) and `target`
    (the true picture) where there are any.

    Args:
        path: a table as for `open_pictures` with the columns of the Emu-Edit test set: `image`, `instruction` (or
            `prompt`) and `output_caption`, the target's caption; or with `target`, its picture.
        split: of a data set with several.
    """
    path = Path(path)
    if not _is_table(path):
        raise ValueError(f"{path} is no data set of edits: expected parquet files or a folder of save_to_disk")
    table = open_table(path, split)
    image, prompt = _column(table, ("image",), path), _column(table, ("instruction", "prompt"), path)
    optional = [name for name in ("output_caption", "target") if name in table.column_names]

    def read(row: dict[str, Any]) -> dict[str, Any]:
        sample = {"image": as_rgb(row[image]), "prompt": row[prompt]}
        if "output_caption" in row:
            sample["caption"] = row["output_caption"]
        if "target" in row:
            sample["target"] = as_rgb(row["target"])
        return sample

    return _table_samples(table, path, split, read, [image, prompt, *optional])


def open_table(path: Path, split: str | None):
    """A `datasets.Dataset` of parquet files or of a `save_to_disk` folder.

    Raises:
        ValueError: several splits and none chosen, or none of that name.
    """
    from datasets import Dataset, load_from_disk

    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return load_from_disk(str(path / _chosen(split, splits, path)))
    if (path / "state.json").is_file():
        return load_from_disk(str(path))
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    # The Hub names its files SPLIT-00000-of-00014.parquet.
    by_split: dict[str, list[str]] = {}
    for file in files:
        by_split.setdefault(file.stem.split("-")[0], []).append(str(file))
    return Dataset.from_parquet(by_split[_chosen(split, list(by_split), path)])


def _chosen(split: str | None, splits: list[str], path: Path) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split not in splits:
        raise ValueError(f"{path} has the splits {', '.join(splits)}: choose one with --split, got {split}")
    return split


def _is_table(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".parquet"
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file() or any(path.rglob("*.parquet"))


def _column(table, names: Sequence[str], path: Path) -> str:
    """The first of `names` that is a column of the table."""
    for name in names:
        if name in table.column_names:
            return name
    raise ValueError(f"{path} has no column {' or '.join(names)}, only {', '.join(table.column_names)}")


def _table_samples(table, path: Path, split: str | None, read: Callable, columns: list[str]) -> Samples:
    """Rows of a table, of which only some columns are decoded; an id is a row's number."""
    table = table.select_columns(columns)
    ids = fixed_order(list(range(len(table))))
    return Samples(ids, lambda index: read(table[index]), _source(path, split, len(ids)))


def _source(path: Path, split: str | None, count: int) -> dict[str, Any]:
    return {"data": str(path), "split": split, "available": count}


def read_picture(file: Path) -> Image.Image:
    """Raises `ValueError` with the file's name if it is no picture."""
    try:
        with Image.open(file) as opened:
            return as_rgb(opened)
    except FileNotFoundError as error:
        raise ValueError(f"no such picture: {file}") from error
    except Exception as error:  # the decoders raise errors of all kinds on damaged files
        raise ValueError(f"cannot read the picture {file}: {error}") from error
