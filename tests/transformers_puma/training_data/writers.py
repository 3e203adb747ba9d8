"""Small files in exactly the formats of the data sets."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    """Smooth enough that JPEG keeps it, and different for every seed."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))


def encoded(image: Image.Image, format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


def truncated(image: Image.Image) -> bytes:
    return encoded(image)[:-200] if len(encoded(image)) > 400 else encoded(image)[: len(encoded(image)) // 2]


def write_picture(file: Path, seed: int = 0, size: tuple[int, int] = (24, 16)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(*size, seed=seed).save(file)


def write_json_lines(file: Path, records: list) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records))
    return file


def write_tar(file: Path, samples: list[dict[str, bytes]]) -> Path:
    """Members `{__key__}.{extension}`, as webdataset's TarWriter orders them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for sample in samples:
            for extension in sorted(set(sample) - {"__key__"}):
                member = tarfile.TarInfo(f"{sample['__key__']}.{extension}")
                member.size = len(sample[extension])
                tar.addfile(member, io.BytesIO(sample[extension]))
    return file


def img2dataset_sample(index: int, caption: str, size: tuple[int, int] = (24, 16), **columns) -> dict:
    """What img2dataset's WebDatasetSampleWriter writes of one picture; `columns` are the additional ones."""
    key = f"{index:09d}"
    record = {
        **columns,
        "caption": caption,
        "url": f"https://example.com/{key}.jpg",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": size[0],
        "height": size[1],
        "original_width": 2 * size[0],
        "original_height": 2 * size[1],
        "exif": "{}",
        "sha256": "0" * 64,
    }
    image = encoded(picture(*size, seed=index))
    return {"__key__": key, "jpg": image, "txt": caption.encode(), "json": json.dumps(record, indent=4).encode()}


def write_laion_tars(folder: Path, num_tars: int, num_samples: int, size: tuple[int, int] = (24, 16)) -> list[str]:
    """Tars of num_samples pictures each; returns all captions."""
    captions = [f"caption {i}" for i in range(num_tars * num_samples)]
    for tar in range(num_tars):
        indices = range(tar * num_samples, (tar + 1) * num_samples)
        write_tar(folder / f"{tar:05d}.tar", [img2dataset_sample(i, captions[i], size) for i in indices])
    return captions
