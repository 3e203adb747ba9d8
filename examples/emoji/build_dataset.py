"""Build a data set of real pictures with text from published emoji sets (one command, about a minute):

    python examples/emoji/build_dataset.py --out data/emoji

Splits, fixed by hashes so that they never depend on the order of anything:
  train            what may be trained on
  heldout_concept  concepts that no other split shows, in any style: for everything that starts from a picture
  heldout_pair     (concept, style) pairs whose concept train shows in other styles: for what starts from words
"""

import argparse
import hashlib
import io
import multiprocessing
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import resvg_py
from datasets import Dataset, DatasetDict, Features, Image, List, Value, load_from_disk
from emoji_sets import (
    EMOJI_SETS,
    TEXT_PACKAGE,
    TEXT_VERSION,
    Drawing,
    EmojiBuildError,
    fetch,
    licence_table,
    read_drawings,
    read_emoji,
)
from PIL import Image as PILImage
from tqdm import tqdm

SIZE = 64
HELDOUT_CONCEPTS = 0.10
HELDOUT_PAIRS = 0.05
SPLITS = ("train", "heldout_concept", "heldout_pair")
TEXT_COLUMNS = ("name", "codepoints", "base", "group", "subgroup", "tone", "gender")
FEATURES = Features(
    {"image": Image(), "style": Value("string"), "tags": List(Value("string"))}
    | {column: Value("string") for column in TEXT_COLUMNS}
)


def fraction(*key: str) -> float:
    """A number in [0, 1) that depends on nothing but `key`."""
    return int.from_bytes(hashlib.sha256("|".join(key).encode()).digest()[:8], "big") / 2**64


def render(svg: str) -> bytes:
    """SVG -> PNG bytes, RGB on white. System fonts stay out, so that every machine draws the same."""
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, background="white", skip_system_fonts=True, dpi=96))
    rgb = io.BytesIO()
    PILImage.open(io.BytesIO(png)).convert("RGB").save(rgb, "PNG")
    return rgb.getvalue()


def render_all(drawings: list[Drawing], workers: int) -> list[bytes]:
    with multiprocessing.Pool(workers) as pool:
        pictures = pool.imap(render, [drawing.svg for drawing in drawings], chunksize=32)
        return list(tqdm(pictures, total=len(drawings), desc="rendering", unit="picture"))


def distinct(drawings: list[Drawing], pictures: list[bytes]) -> list[tuple[Drawing, bytes]]:
    """Drop a picture that its family has already: sets reuse one drawing for 'person' and 'man', and each other's."""
    first: dict[tuple[str, bytes], Drawing] = {}
    for drawing, picture in zip(drawings, pictures, strict=True):
        first.setdefault((drawing.emoji.family, picture), drawing)
    return [(drawing, picture) for (_, picture), drawing in first.items()]


def linked_families(rows: list[tuple[Drawing, bytes]]) -> dict[str, str]:
    """Family -> one name for all families that share a picture, such as the flags of Norway and Svalbard."""
    link: dict[str, str] = {drawing.emoji.family: drawing.emoji.family for drawing, _ in rows}

    def root(family: str) -> str:
        while link[family] != family:
            family = link[family]
        return family

    owner: dict[bytes, str] = {}
    for drawing, picture in rows:
        first, second = sorted((root(owner.setdefault(picture, drawing.emoji.family)), root(drawing.emoji.family)))
        link[second] = first
    return {family: root(family) for family in link}


def assign_splits(rows: list[tuple[Drawing, bytes]]) -> list[str]:
    """The split of each row.

    Whole families are held out, so that skin tone, gender and hair variants don't straddle a split. A (family, style)
    pair is held out only if train keeps every concept in it in another style.
    """
    linked = linked_families(rows)
    pairs = [(linked[drawing.emoji.family], drawing.style) for drawing, _ in rows]
    unseen = {family for family in linked.values() if fraction("concept", family) < HELDOUT_CONCEPTS}
    held_out = {pair for pair in pairs if pair[0] not in unseen and fraction("pair", *pair) < HELDOUT_PAIRS}
    styles_left = Counter({drawing.emoji.base: 0 for drawing, _ in rows})
    styles_left.update(
        drawing.emoji.base for (drawing, _), pair in zip(rows, pairs, strict=True) if pair not in held_out
    )
    held_out -= {pair for (drawing, _), pair in zip(rows, pairs, strict=True) if not styles_left[drawing.emoji.base]}
    return [
        "heldout_concept" if pair[0] in unseen else "heldout_pair" if pair in held_out else "train" for pair in pairs
    ]


def to_dataset(rows: list[tuple[Drawing, bytes]]) -> Dataset:
    columns = {
        "image": [{"bytes": picture, "path": None} for _, picture in rows],
        "style": [drawing.style for drawing, _ in rows],
        "tags": [list(drawing.emoji.tags) for drawing, _ in rows],
    }
    columns |= {column: [getattr(drawing.emoji, column) for drawing, _ in rows] for column in TEXT_COLUMNS}
    return Dataset.from_dict(columns, features=FEATURES)


def save(dataset: DatasetDict, licences: str, out: Path) -> None:
    """Write beside `out` and rename, so that `out` is always a whole data set or none."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        dataset.save_to_disk(f"{scratch}/new")
        Path(scratch, "new", "LICENSES.md").write_text(licences, encoding="utf-8")
        if out.exists():
            out.rename(Path(scratch, "old"))
        Path(scratch, "new").rename(out)


def build(out: Path, cache: Path, workers: int) -> DatasetDict:
    """Download what `cache` lacks, render, split and save.

    Raises:
        EmojiBuildError: a package can't be downloaded or read, or `out` holds something else than a data set.
    """
    replaceable = not out.exists() or (out / "dataset_dict.json").exists() or (out.is_dir() and not any(out.iterdir()))
    if not replaceable:
        raise EmojiBuildError(f"{out} holds something else than a data set: give another --out")
    wanted = [*((emoji_set.package, emoji_set.version) for emoji_set in EMOJI_SETS), (TEXT_PACKAGE, TEXT_VERSION)]
    tarballs = {
        package: fetch(package, version, cache)
        for package, version in tqdm(wanted, desc="downloading", unit="package")
    }
    drawings = read_drawings(tarballs, read_emoji(tarballs[TEXT_PACKAGE]), SIZE)
    rows = distinct(drawings, render_all(drawings, workers))
    splits = assign_splits(rows)
    dataset = DatasetDict(
        {name: to_dataset([row for row, split in zip(rows, splits, strict=True) if split == name]) for name in SPLITS}
    )
    save(dataset, licence_table(tarballs), out)
    return dataset


def load_emoji(path: str | Path) -> DatasetDict:
    """The data set that this command built at `path`.

    Raises:
        FileNotFoundError: nothing is built there; the message holds the command that does it.
    """
    if not Path(path, "dataset_dict.json").exists():
        raise FileNotFoundError(
            f"no emoji data set at {path}; build it with: python examples/emoji/build_dataset.py --out {path}"
        )
    return load_from_disk(str(path))


def to_uint8(split: Dataset) -> np.ndarray:
    """All pictures of a split in memory: uint8 (n, 64, 64, 3), RGB, in the order of its rows."""
    pixels = np.empty((len(split), SIZE, SIZE, 3), dtype=np.uint8)
    for row, image in enumerate(split["image"]):
        pixels[row] = np.asarray(image.convert("RGB"))
    return pixels


def summary(dataset: DatasetDict) -> str:
    """Rows and concepts per split, and rows per style."""
    lines = []
    for name, split in dataset.items():
        styles = ", ".join(f"{style} {count}" for style, count in Counter(split["style"]).most_common())
        lines.append(f"{name}: {split.num_rows} pictures of {len(set(split['base']))} concepts ({styles})")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build the emoji data set from npm packages.")
    parser.add_argument("--out", type=Path, default=Path("data/emoji"), help="folder of the data set (replaced whole)")
    parser.add_argument("--cache", type=Path, help="folder of the downloaded packages (default: OUT-downloads)")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count(), help="processes that render")
    arguments = parser.parse_args(argv)
    cache = arguments.cache or arguments.out.with_name(f"{arguments.out.name}-downloads")
    try:
        dataset = build(arguments.out, cache, arguments.workers)
    except EmojiBuildError as error:
        sys.exit(f"error: {error}")
    print(summary(dataset))
    print(f"saved in {arguments.out}, with the licences of the sets in {arguments.out / 'LICENSES.md'}")


if __name__ == "__main__":
    main()
