"""Photographs of another kind than the emoji, to see what the small model makes of pictures that no training is like:

    python examples/emoji/build_stamps.py --out data/stamps
    python examples/emoji/report.py --data data/stamps --out runs/emoji/report-stamps

The cut-out photographs of Tux Paint's stamps, from Debian's package (GPL-2, so they are downloaded and never part of
this repository), on white at 64 x 64, in the form of the emoji data with the one split `heldout_concept`.
"""

import argparse
import hashlib
import io
import lzma
import os
import sys
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from build_dataset import FEATURES, SIZE, save
from datasets import Dataset, DatasetDict
from emoji_sets import EmojiBuildError
from PIL import Image
from tqdm import tqdm

VERSION = "2022.06.04-1"
FILE = f"tuxpaint-stamps-default_{VERSION}_all.deb"
URL = f"https://deb.debian.org/debian/pool/main/t/tuxpaint-stamps/{FILE}"
SHA256 = "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34"
ROOT = "./usr/share/tuxpaint/stamps/"
# Folders of photographs; the others hold symbols, letters, signs and drawings.
FOLDERS = {"animals", "food", "hobbies", "household", "military", "plants", "space", "sports", "vehicles"}
LICENCES = f"""# Where these pictures come from

Tux Paint's stamps, Debian package tuxpaint-stamps-default {VERSION} ({URL}).
Copyright 2002-2022 Bill Kendrick and the contributors of Tux Paint. Licence: GPL-2
(https://www.gnu.org/licenses/old-licenses/gpl-2.0.html). Shrunk to {SIZE} x {SIZE} pixels on white.
"""


def fetch(cache: Path) -> Path:
    """The package in `cache`, downloaded unless it is there.

    Raises:
        EmojiBuildError: the download fails or is not the file that this script was made for.
    """
    target = cache / FILE
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(URL, timeout=60) as response, partial.open("wb") as file:
            total = int(response.headers["Content-Length"])
            with tqdm(total=total, desc="downloading", unit="B", unit_scale=True) as bar:
                while part := response.read(1 << 20):
                    file.write(part)
                    digest.update(part)
                    bar.update(len(part))
    except OSError as error:
        raise EmojiBuildError(f"{URL} can't be downloaded: {error}") from error
    if digest.hexdigest() != SHA256:
        raise EmojiBuildError(f"{URL} has the SHA-256 {digest.hexdigest()}, expected {SHA256}")
    os.replace(partial, target)
    return target


def member(package: BinaryIO, name: str) -> bytes:
    """A member of a .deb, which is an `ar` archive: a magic line, then 60 bytes of header before each member."""
    if package.read(8) != b"!<arch>\n":
        raise EmojiBuildError("not a Debian package")
    while header := package.read(60):
        size = int(header[48:58])
        if header[:16].decode().strip().rstrip("/") == name:
            return package.read(size)
        package.seek(size + size % 2, os.SEEK_CUR)
    raise EmojiBuildError(f"the package holds no {name}")


def on_white(stamp: Image.Image, size: int = SIZE, margin: int = 2) -> Image.Image:
    """A cut-out picture as large as fits a white square, in its middle."""
    stamp = stamp.crop(stamp.getchannel("A").getbbox())
    stamp.thumbnail((size - 2 * margin,) * 2, Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(stamp, ((size - stamp.width) // 2, (size - stamp.height) // 2), stamp)
    return canvas


def is_photograph(path: str) -> bool:
    parts = path.split("/")
    return parts[0] in FOLDERS and "cartoon" not in parts


def read_rows(archive: tarfile.TarFile) -> Iterator[dict]:
    """A row of the emoji data for each photograph: its caption is the first line of the text beside it."""
    files = {item.name.removeprefix(ROOT): item for item in archive.getmembers() if item.isfile()}
    for path in sorted(path for path in files if path.endswith(".png") and is_photograph(path)):
        stamp = Image.open(io.BytesIO(archive.extractfile(files[path]).read()))
        if stamp.mode != "RGBA":
            continue
        text = files.get(path.removesuffix(".png") + ".txt")
        caption = archive.extractfile(text).readline().decode().strip().rstrip(".!") if text else Path(path).stem
        png = io.BytesIO()
        on_white(stamp).save(png, "PNG")
        row = dict.fromkeys(FEATURES, "") | {"tone": "none", "gender": "none", "style": "photograph", "tags": []}
        row |= {"name": caption, "base": path, "codepoints": path, "group": path.split("/")[0]}
        yield row | {"image": {"bytes": png.getvalue(), "path": None}}


def build(out: Path, cache: Path) -> DatasetDict:
    """Download what `cache` lacks, shrink and save.

    Raises:
        EmojiBuildError: the package can't be downloaded or read, or `out` holds something else than a data set.
    """
    if out.exists() and not (out / "dataset_dict.json").exists():
        raise EmojiBuildError(f"{out} holds something else than a data set: give another --out")
    with fetch(cache).open("rb") as package:
        files = io.BytesIO(lzma.decompress(member(package, "data.tar.xz")))
    with tarfile.open(fileobj=files) as archive:
        rows = list(tqdm(read_rows(archive), desc="shrinking", unit="picture"))
    dataset = DatasetDict({"heldout_concept": Dataset.from_list(rows, features=FEATURES)})
    save(dataset, LICENCES, out)
    return dataset


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("data/stamps"), help="folder of the data set (replaced whole)"
    )
    parser.add_argument("--cache", type=Path, help="folder of the downloaded package (default: OUT-downloads)")
    arguments = parser.parse_args(argv)
    cache = arguments.cache or arguments.out.with_name(f"{arguments.out.name}-downloads")
    try:
        dataset = build(arguments.out, cache)
    except EmojiBuildError as error:
        sys.exit(f"error: {error}")
    print(f"{dataset['heldout_concept'].num_rows} photographs saved in {arguments.out} (GPL-2, see its LICENSES.md)")


if __name__ == "__main__":
    main()
