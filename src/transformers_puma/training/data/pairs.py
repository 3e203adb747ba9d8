"""Pictures with captions, and plain text.

- LAION-2B and LAION-Aesthetics are lists of addresses; what is read is what img2dataset
  (github.com/rom1504/img2dataset, `img2dataset/writer.py`) writes when it downloads them, as webdataset (`{key}.jpg`,
  `.txt`, `.json` in `00000.tar`) or as parquet (`key`, `jpg`, `caption`, `status`; rows whose download failed have no
  picture and are left out).
- GRIT (huggingface.co/datasets/zzliang/GRIT, its card) is downloaded likewise, with `noun_chunks` and `ref_exps` saved
  in `.json`: lists of [start, end, x_min, y_min, x_max, y_max, score], the first two being places in `caption`, the
  next four fractions of the picture's size.
- JourneyDB (huggingface.co/datasets/JourneyDB/JourneyDB): `data/train` with `train_anno_realease_repath.jsonl` (sic;
  `img_path`, `prompt`, `Task2.Caption`, which is missing in some rows) and `imgs/000/...`, unpacked.
- The Pile (Gao et al. 2020, arXiv 2101.00027): `train/00.jsonl.zst` ..., lines with `text` and `meta.pile_set_name`.
- A folder of one's own: what the `imagefolder` builder of `datasets` reads (`metadata.jsonl` or `metadata.csv` with
  `file_name` and a caption column), or pictures with a `.txt` file of the same name beside each.
- Parquet of one's own: a column of pictures (bytes, or the `Image` type of `datasets`) and one of captions.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any

from datasets import IterableDataset, load_dataset

from ...boxes_puma import BOX_MARK, IMAGE_TOKEN
from .readers import Reader, line_place, tar_place
from .samples import BrokenSampleError, Sample, field, image_file, make_sample, stored_image, text_field
from .streams import (
    Paths,
    find_files,
    line_stream,
    parquet_stream,
    parse_object,
    parse_record,
    picture_stream,
    webdataset_stream,
)

PICTURES = ("*.[jJ][pP][gG]", "*.[jJ][pP][eE][gG]", "*.[pP][nN][gG]", "*.[wW][eE][bB][pP]")


def laion(path: Paths, *, num_shards: int = 1, seed: int | None = None, caption: str = "txt") -> Reader:
    """Tars or parquet files of img2dataset.

    Args:
        caption: the field that holds the caption: in tars "txt" or a key of the `.json`; in parquet "txt" stands for
            the column `caption`, which is the same text.
    """
    files = find_files(path, ["*.tar", "*.parquet"], seed)
    # Beside each tar, img2dataset writes a parquet file of the metadata alone.
    if tars := [file for file in files if file.endswith(".tar")]:
        return Reader(webdataset_stream(tars), functools.partial(_parse_laion_tar, caption=caption), tar_place)
    column = "caption" if caption == "txt" else caption
    stream = parquet_stream(files, num_shards)
    _check_columns(stream, ["key", "jpg", column])
    return Reader(stream, functools.partial(_parse_laion_row, caption=column), _parquet_key)


def grit(path: Paths, *, seed: int | None = None, phrases: str = "noun_chunks") -> Reader:
    """Tars of img2dataset; each phrase of the caption is followed by the marks of its boxes.

    Args:
        phrases: "noun_chunks" or "ref_exps" (longer phrases: those chunks with what belongs to them).
    """
    if phrases not in ("noun_chunks", "ref_exps"):
        raise ValueError(f"phrases must be 'noun_chunks' or 'ref_exps', got {phrases!r}")
    stream = webdataset_stream(find_files(path, ["*.tar"], seed))
    return Reader(stream, functools.partial(_parse_grit, phrases=phrases), tar_place)


def journeydb(path: str, *, num_shards: int = 1, seed: int | None = None, caption: str = "prompt") -> Reader:
    """JourneyDB's folder of one split.

    Args:
        caption: "prompt" (what the picture was drawn from) or "caption" (`Task2.Caption`, a description; rows that
            have none are left out).
    """
    if caption not in ("prompt", "caption"):
        raise ValueError(f"caption must be 'prompt' or 'caption', got {caption!r}")
    folder = Path(path)
    stream = line_stream(find_files(folder / "*_repath.jsonl", [], seed), num_shards)
    return Reader(stream, functools.partial(_parse_journeydb, images=folder / "imgs", caption=caption), line_place)


def the_pile(path: Paths, *, num_shards: int = 1, seed: int | None = None) -> Reader:
    """Texts of `.jsonl.zst` files."""
    return Reader(line_stream(find_files(path, ["*.jsonl.zst"], seed), num_shards), _parse_pile, line_place)


def folder(path: str, *, seed: int | None = None, caption: str = "text") -> Reader:
    """Pictures in a folder.

    Args:
        caption: the column of the metadata file that holds the caption.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(f"no such folder: {path}")
    if not list(Path(path).rglob("metadata.*")):
        stream = picture_stream(find_files(path, PICTURES, seed))
        return Reader(stream, _parse_captioned_file, _image_place)
    stream = load_dataset("imagefolder", data_dir=str(path), split="train", streaming=True).decode(False)
    _check_columns(stream, ["image", caption])
    return Reader(stream, functools.partial(_parse_table_row, image="image", caption=caption), _image_place)


def parquet(
    path: Paths, *, num_shards: int = 1, seed: int | None = None, image: str = "image", caption: str = "caption"
) -> Reader:
    """Parquet files.

    Args:
        image, caption: the columns that hold them.
    """
    stream = parquet_stream(find_files(path, ["*.parquet"], seed), num_shards)
    _check_columns(stream, [image, caption])
    parse = functools.partial(_parse_table_row, image=image, caption=caption)
    return Reader(stream, parse, functools.partial(_row_place, caption=caption))


def _check_columns(stream: IterableDataset, names: list[str]) -> None:
    missing = [name for name in names if name not in stream.features]
    if missing:
        raise ValueError(f"no column {', '.join(missing)}; the columns are {', '.join(stream.features)}")


def _parquet_key(raw: dict[str, Any]) -> str:
    return f"row {raw['key']}"


def _image_place(raw: dict[str, Any]) -> str:
    return str(raw["image"]["path"])


def _row_place(raw: dict[str, Any], caption: str) -> str:
    return f"the row with {caption} {str(raw[caption])[:60]!r}"


def _parse_laion_tar(raw: dict[str, Any], caption: str) -> list[Sample]:
    if caption == "txt":
        text = text_field({"txt": field(raw, "txt", bytes).decode(errors="replace")}, "txt")
    else:
        text = text_field(parse_object(field(raw, "json", bytes)), caption)
    return [make_sample(_tar_key(raw), {"caption": text}, [_tar_picture(raw)])]


def _tar_picture(raw: dict[str, Any]) -> dict:
    return stored_image(raw["jpg"] or raw["png"] or raw["webp"], "jpg")


def _tar_key(raw: dict[str, Any]) -> str:
    return f"{Path(raw['__url__']).name}/{raw['__key__']}"


def _parse_laion_row(raw: dict[str, Any], caption: str) -> list[Sample]:
    if raw.get("status", "success") != "success":
        return []
    key = field(raw, "key")
    return [make_sample(key, {"caption": text_field(raw, caption)}, [stored_image(raw["jpg"], "jpg")])]


def _parse_grit(raw: dict[str, Any], phrases: str) -> list[Sample]:
    record = parse_object(field(raw, "json", bytes))
    caption = field(record, "caption")
    if IMAGE_TOKEN in caption or BOX_MARK in caption:
        raise BrokenSampleError(f"the caption holds markup: {caption!r}")
    boxes = [_grounded(caption, entry) for entry in field(record, phrases, list)]
    return [make_sample(_tar_key(raw), {"caption": caption, "boxes": boxes}, [_tar_picture(raw)])]


def _grounded(caption: str, entry: list[float]) -> dict[str, Any]:
    """{"end": where in the caption its phrase ends, "box": in fractions of the picture's size}."""
    if not (isinstance(entry, list) and len(entry) == 7 and all(isinstance(item, (int, float)) for item in entry)):
        raise BrokenSampleError(f"a phrase must be [start, end, x_min, y_min, x_max, y_max, score], got {entry}")
    start, end, *box = entry[:6]
    if not 0 <= start < end <= len(caption):
        raise BrokenSampleError(f"the phrase from {start:g} to {end:g} lies outside the caption {caption!r}")
    x_min, y_min, x_max, y_max = box
    if not (x_min < x_max and y_min < y_max):
        raise BrokenSampleError(f"the box {box} has no area")
    return {"end": int(end), "box": box}


def _parse_journeydb(raw: dict[str, str], images: Path, caption: str) -> list[Sample]:
    record = parse_record(raw)
    path = field(record, "img_path")
    if caption == "caption":
        record = record.get("Task2") or {}
        if isinstance(record, dict) and not record.get("Caption"):
            return []
    text = text_field(record, "prompt" if caption == "prompt" else "Caption")
    return [make_sample(path, {"caption": text}, [image_file(images, path)])]


def _parse_pile(raw: dict[str, str]) -> list[Sample]:
    return [make_sample(raw["key"], {"text": text_field(parse_record(raw), "text")})]


def _parse_captioned_file(raw: dict[str, Any]) -> list[Sample]:
    path = Path(raw["image"]["path"])
    try:
        caption = path.with_suffix(".txt").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BrokenSampleError(f"no caption beside it: {error}") from error
    return [make_sample(_file_key(path), {"caption": text_field({"caption": caption}, "caption")}, [raw["image"]])]


def _file_key(path: str | Path) -> str:
    """The file's name and its folder's: the draws should not depend on where the data are."""
    return "/".join(Path(path).parts[-2:])


def _parse_table_row(raw: dict[str, Any], image: str, caption: str) -> list[Sample]:
    picture, text = raw[image], text_field(raw, caption)
    if isinstance(picture, dict) and picture["bytes"] is None and picture["path"]:
        return [make_sample(_file_key(picture["path"]), {"caption": text}, [picture])]
    stored = stored_image(picture, image)
    # The caption alone would be drawn alike for all its pictures.
    key = f"{text} {hashlib.blake2b(stored['bytes'], digest_size=8).hexdigest()}"
    return [make_sample(key, {"caption": text}, [stored])]
