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

from transformers_puma.evaluation.questions import read_json
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

    def have(self, name: str) -> bool:
        """Whether they have a field, which all have or none."""
        return all(name in sample for sample in self.first(1))


def fixed_order(ids: list[SampleId]) -> list[SampleId]:
    """Shuffled by a hash of each id."""
    return sorted(ids, key=lambda item: hashlib.sha256(str(item).encode()).digest())


def open_pictures(path: str | Path, split: str | None = None) -> Samples:
    """Pictures as samples with an `image`.

    Args:
        path: a folder of picture files, searched to the bottom (ImageNet's validation folder); a parquet file or a
            folder of them with an `image` column (ImageNet as the Hub has it), of pictures or of paths to them, which
            `datasets` takes from the current folder; or a folder of `save_to_disk`.
        split: of a data set with several.
    """
    path = Path(path)
    if _is_table(path):
        table = open_table(path, split)
        return _table_samples(table, path, split, {"image": _column(table, ("image",), path)}, {})
    if not path.is_dir():
        raise ValueError(f"no such folder or parquet file: {path}")
    if split is not None:
        raise ValueError(f"{path} is a folder of pictures, which has no splits, got split={split!r}")
    files = [file for file in path.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES]
    # Hidden ones are no pictures, such as what macOS puts beside each on a foreign disk.
    files = [file.relative_to(path) for file in files if not file.name.startswith(".")]
    if not files:
        suffixes = ", ".join(sorted(PICTURE_SUFFIXES))
        raise ValueError(f"{path} holds no pictures ({suffixes}), no parquet files and no data set")
    ids = fixed_order([file.as_posix() for file in files])
    return Samples(ids, lambda name: {"image": read_picture(path / name)}, source_of(path, split, ids))


def open_captions(path: str | Path, split: str | None = None, template: str | None = None) -> Samples:
    """Captions as samples with a `prompt`, and the true `image` where there is one.

    Args:
        path: COCO 2014 (a folder with `captions_val2014.json`, there or in `annotations`, and `val2014`), or a table
            as for `open_pictures` with a column of captions; its true pictures are in the column `image` or `target`.
        split: of a data set with several.
        template: how a prompt is made of a row's columns, such as `"{name} in {style} style"`; by default it is the
            column `caption`, `prompt` or `text`, of a list its first item.

    Raises:
        ValueError: files that are not as expected, or a caption that is missing or empty.
    """
    path = Path(path)
    if _is_table(path):
        return _captions_of_table(path, split, template)
    found = [file for file in (path / COCO_CAPTIONS, path / "annotations" / COCO_CAPTIONS) if file.is_file()]
    if not found:
        raise ValueError(f"{path} holds neither {COCO_CAPTIONS} (of COCO 2014) nor a data set with captions")
    for name, value in (("split", split), ("template", template)):
        if value is not None:
            raise ValueError(f"{found[0]} is taken as COCO 2014 has it, got {name}={value!r}")
    return _coco(found[0], path / "val2014")


def _coco(annotations: Path, pictures: Path) -> Samples:
    """The 30,000 of COCO: pictures in `fixed_order` of their ids, each with its caption of lowest id.

    The report does not say which 30,000 of the 202,654 captions it takes. One of each picture keeps the true pictures
    of FID distinct.
    """
    content, captions = read_json(annotations), {}
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        for annotation in sorted(content["annotations"], key=lambda item: item["id"]):
            captions.setdefault(annotation["image_id"], (annotation["caption"] or "").strip())
        files = {image_id: pictures / names[image_id] for image_id in captions}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{annotations} must hold images with id and file_name, and annotations of them with id, image_id and "
            f"caption: {error!r}"
        ) from error
    empty = [image_id for image_id, caption in captions.items() if not caption]
    if empty:
        raise ValueError(f"{annotations} has an empty caption of image {empty[0]}")
    ids = fixed_order(list(captions))[:COCO_SUBSET]

    def read(image_id: int) -> dict[str, Any]:
        return {"prompt": captions[image_id], "image": read_picture(files[image_id])}

    return Samples(ids, read, source_of(annotations, None, [(key, captions[key]) for key in ids]))


def _captions_of_table(path: Path, split: str | None, template: str | None) -> Samples:
    table = open_table(path, split)
    if template is None:
        prompts = _texts(table, _column(table, CAPTION_COLUMNS, path), path)
    else:
        prompts = _fill(template, table, path)
    picture = next((name for name in ("image", "target") if name in table.column_names), None)
    pictures = {} if picture is None else {"image": picture}
    samples = _table_samples(table, path, split, pictures, {"prompt": prompts})
    return Samples(samples.ids, samples.read, {**samples.source, "template": template})


def _texts(table, column: str, path: Path) -> list[str]:
    """The column's text of each row, of a list its first.

    Raises:
        ValueError: a row without.
    """
    texts = [value[0] if isinstance(value, list) and value else value for value in table[column][:]]
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path} must have a text in column {column} of every row, row {row} has {text!r}")
    return texts


def _fill(template: str, table, path: Path) -> list[str]:
    """The template with each row's columns.

    Raises:
        ValueError: columns that are not there or none at all, or a row that has no value for one.
    """
    columns = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    if not columns:
        raise ValueError(f"a template names columns, such as {{{table.column_names[0]}}}, got {template!r}")
    columns = list(dict.fromkeys(_column(table, (column,), path) for column in columns))
    rows = table.select_columns(columns).to_list()
    for number, row in enumerate(rows):
        if None in row.values():
            raise ValueError(f"{path} must have all of {', '.join(columns)} in every row, row {number} has {row}")
    return [template.format(**row) for row in rows]


def open_edits(path: str | Path, split: str | None = None) -> Samples:
    """Edits as samples with a source `image`, the instruction as `prompt`, and `caption` (of the target) and `target`
    (the true picture) where there are any.

    Args:
        path: a table as for `open_pictures` with the columns of the Emu-Edit test set: `image`, `instruction` (or
            `prompt`) and `output_caption`, the target's caption; or with `target`, its picture.
        split: of a data set with several.

    Raises:
        ValueError: files that are not as expected, or a text that is missing or empty.
    """
    path = Path(path)
    if not _is_table(path):
        raise ValueError(f"{path} is no data set of edits: expected parquet files or a folder of save_to_disk")
    table = open_table(path, split)
    pictures = {"image": _column(table, ("image",), path)}
    texts = {"prompt": _texts(table, _column(table, ("instruction", "prompt"), path), path)}
    if "target" in table.column_names:
        pictures["target"] = "target"
    if "output_caption" in table.column_names:
        texts["caption"] = _texts(table, "output_caption", path)
    return _table_samples(table, path, split, pictures, texts)


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
        if split is not None:
            raise ValueError(f"{path} is one saved data set, not several splits, got split={split!r}")
        return load_from_disk(str(path))
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    # The Hub names its files SPLIT-00000-of-00014.parquet, and those that it converts SPLIT/0000.parquet.
    by_split: dict[str, list[str]] = {}
    for file in files:
        name = file.parent.name if file.stem.isdigit() else file.stem.split("-")[0]
        by_split.setdefault(name, []).append(str(file))
    return Dataset.from_parquet(by_split[_chosen(split, list(by_split), path)])


def _chosen(split: str | None, splits: list[str], path: Path) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split not in splits:
        raise ValueError(f"{path} has the splits {', '.join(splits)}: choose one as `split`, got {split}")
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


def _table_samples(
    table, path: Path, split: str | None, pictures: dict[str, str], texts: dict[str, list[str]]
) -> Samples:
    """Rows of a table; an id is a row's number.

    Args:
        pictures: field of a sample -> the table's column.
        texts: field of a sample -> the texts of all rows.
    """
    ids = fixed_order(list(range(len(table))))
    tables = {name: _as_pictures(table.select_columns([column]), path) for name, column in pictures.items()}

    def read(row: int) -> dict[str, Any]:
        sample = {name: values[row] for name, values in texts.items()}
        return sample | {name: read_cell(table, row, path) for name, table in tables.items()}

    return Samples(ids, read, source_of(path, split, [(row, *(texts[name][row] for name in texts)) for row in ids]))


def _as_pictures(table, path: Path):
    """A table of one column, which is of pictures, their bytes or paths, as one of pictures.

    Raises:
        ValueError: a column of anything else.
    """
    from datasets import Image as ImageFeature

    ((column, feature),) = table.features.items()
    if feature == ImageFeature():  # a cast would go through all of them
        return table
    try:
        return table.cast_column(column, ImageFeature())
    except (NotImplementedError, TypeError, ValueError) as error:  # as Arrow raises of a type that has no cast
        raise ValueError(f"column {column} of {path} must hold pictures or paths to them, not {feature}") from error


def read_cell(table, row: int, path: Path) -> Image.Image:
    """The picture in a row of a table of one column. Raises `ValueError` that says where there is none."""
    (column,) = table.column_names
    try:
        picture = table[row][column]
        if picture is None:
            raise ValueError("there is none")
        return as_rgb(picture)
    except Exception as error:  # the decoders raise errors of all kinds on damaged files
        raise ValueError(f"cannot read the picture in column {column} of {path}, row {row}: {error}") from error


def source_of(path: Path, split: str | None, known: list) -> dict[str, Any]:
    """`known`: of each sample what is known without its picture, so that a run does not go on with others."""
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
    return {"data": str(path), "split": split, "available": len(known), "samples": digest}


def read_picture(file: Path) -> Image.Image:
    """Raises `ValueError` with the file's name if it is no picture."""
    try:
        with Image.open(file) as opened:
            return as_rgb(opened)
    except FileNotFoundError as error:
        raise ValueError(f"no such picture: {file}") from error
    except Exception as error:  # the decoders raise errors of all kinds on damaged files
        raise ValueError(f"cannot read the picture {file}: {error}") from error
