"""A few drawn pictures in the file formats of the report's data sets, for the small training configurations:

python examples/configs/small/make_data.py --out data/small
"""

import argparse
import io
import json
import tarfile
from pathlib import Path

import pandas
import zstandard
from PIL import Image, ImageDraw, ImageFilter, ImageOps

COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("disc", "square")
SIDE = 512  # the smallest that the decoders' stage takes
BOX = (0.25, 0.25, 0.75, 0.75)  # of each shape, in parts of the picture


def draw(colour: str, shape: str) -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(picture)
    (pen.ellipse if shape == "disc" else pen.rectangle)([part * SIDE for part in BOX], fill=colour)
    return picture


def pictures() -> list[tuple[str, str, Image.Image]]:
    """(key, caption, picture) of every colour and shape."""
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    return [(f"{i:09d}", f"a {colour} {shape}", draw(colour, shape)) for i, (colour, shape) in enumerate(pairs)]


def as_jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    return buffer.getvalue()


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_lines(path: Path, records: list[dict]) -> None:
    write(path, "".join(json.dumps(record) + "\n" for record in records))


def write_tar(path: Path, grounded: bool) -> None:
    """As img2dataset writes LAION; with `noun_chunks` it is GRIT."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, caption, picture in pictures():
            record = {"key": key, "caption": caption, "width": SIDE, "height": SIDE}
            if grounded:
                record["noun_chunks"] = [[0, len(caption), *BOX, 0.99]]
            files = {"jpg": as_jpeg(picture), "txt": caption.encode(), "json": json.dumps(record).encode()}
            for extension, content in files.items():
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def write_pile(out: Path) -> None:
    texts = [f"A {colour} {shape} is a {shape} that is {colour}." for colour in COLOURS for shape in SHAPES]
    lines = "".join(json.dumps({"text": text, "meta": {"pile_set_name": "small"}}) + "\n" for text in texts)
    write(out / "pile/train/00.jsonl.zst", zstandard.compress(lines.encode()))


def write_journeydb(out: Path) -> None:
    folder, records = out / "journeydb/data/train", []
    for key, caption, picture in pictures():
        write(folder / f"imgs/000/{key}.jpg", as_jpeg(picture))
        records.append(
            {"img_path": f"./000/{key}.jpg", "prompt": caption, "Task2": {"Caption": f"{caption} on white"}}
        )
    write_lines(folder / "train_anno_realease_repath.jsonl", records)


def conversation(key: str, caption: str, image: str) -> dict:
    """LLaVA's form."""
    question, answer = "<image>\nWhat is this?", f"This is {caption}."
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": key, "image": image, "conversations": turns}


def write_questions(out: Path) -> None:
    """OCR-VQA-200K, LLaVAR, LLaVA-OneVision and Cambrian."""
    books, notes, chats, rows = {}, [], [], []
    for key, caption, picture in pictures():
        jpeg = as_jpeg(picture)
        for image in (f"ocr-vqa-200k/images/{key}.jpg", f"llavar/images/{key}.jpg", f"cambrian-10m/small/{key}.jpg"):
            write(out / image, jpeg)
        books[key] = {
            "imageURL": f"http://localhost/{key}.jpg",
            "questions": ["What is this?", "Is it round?"],
            "answers": [caption, "Yes" if "disc" in caption else "No"],
            "title": caption,
            "authorName": "",
            "genre": "shapes",
            "split": 1,
        }
        notes.append(conversation(key, caption, f"{key}.jpg"))
        chats.append(conversation(key, caption, f"small/{key}.jpg") | {"source": "small.json"})
        rows.append(conversation(key, caption, key) | {"image": {"bytes": jpeg, "path": None}, "data_source": "small"})
    write(out / "ocr-vqa-200k/dataset.json", json.dumps(books))
    write(out / "llavar/llavar_instruct_16k.json", json.dumps(notes))
    write_lines(out / "cambrian-10m/jsons/Cambrian7M_withsystemprompt.jsonl", chats)
    (out / "llava-onevision/small").mkdir(parents=True, exist_ok=True)
    pandas.DataFrame(rows).to_parquet(out / "llava-onevision/small/train-00000-of-00001.parquet")


def write_edits(out: Path) -> None:
    """SEED-Data-Edit's real edits: another colour."""
    folder, records = out / "seed-data-edit/real_editing", []
    for i, colour in enumerate(COLOURS):
        target = COLOURS[(i + 1) % len(COLOURS)]
        for name in (colour, target):
            write(folder / f"images/{name}.jpg", as_jpeg(draw(name, "disc")))
        names = {"source_image": f"{colour}.jpg", "target_image": f"{target}.jpg"}
        records.append(names | {"instruction": f"make it {target}"})
    write_lines(folder / "annotations/small.jsonl", records)


def write_conditions(out: Path) -> None:
    """MultiGen-20M: edges, a hole, and grey."""
    folder = out / "multigen-20m"
    records = {"canny": [], "inpainting": [], "grayscale": []}
    for key, caption, picture in pictures():
        hole = picture.copy()
        hole.paste("black", (SIDE // 2, 0, SIDE, SIDE // 2))
        grey = ImageOps.grayscale(picture)
        conditions = {"canny": grey.filter(ImageFilter.FIND_EDGES), "inpainting": hole, "grayscale": grey}
        write(folder / f"images/{key}.jpg", as_jpeg(picture))
        for task, condition in conditions.items():
            write(folder / f"conditions/{task}/{key}.jpg", as_jpeg(condition.convert("RGB")))
            record = {"source": f"{key}.jpg", f"control_{task}": f"{task}/{key}.jpg", "prompt": caption}
            records[task].append(record)
    for task, lines in records.items():
        write_lines(folder / f"json_files/aesthetics_plus_all_group_{task}_all.json", lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/small"))
    out = parser.parse_args(argv).out
    write_tar(out / "laion/00000.tar", grounded=False)
    write_tar(out / "grit/00000.tar", grounded=True)
    for write_source in (write_pile, write_journeydb, write_questions, write_edits, write_conditions):
        write_source(out)


if __name__ == "__main__":
    main()
