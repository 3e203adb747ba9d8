"""Pictures for benchmarks that bring their own judges: each in the folders and under the names its scorer looks for.

GenEval (github.com/djghosh13/geneval), DPG-Bench (github.com/TencentQQGYLab/ELLA), ImgEdit-Bench
(github.com/PKU-YuanGroup/ImgEdit, basic part) and GEdit-Bench (stepfun-ai/GEdit-Bench on the Hub). Nothing is scored
here: their judges are a detector, a VQA model and a commercial language model.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.utils import make_image_grid
from PIL import Image

from puma_files import whole_file
from transformers_puma.evaluation.runner import Row

from ..pipeline_puma import IMAGE_SCALE, TEXT_SCALE
from .data import Samples, open_table, read_cell, read_picture, source_of
from .drawing import Drawer

Files = dict[str, Image.Image | str]  # by path below the folder that the scorer is given


@dataclass(frozen=True)
class PictureBenchmark:
    """A benchmark's prompts and the layout of its pictures.

    open: path -> samples with `prompt`, edits also with the source `image`.
    layout: a sample and its pictures, one for each seed -> files.
    num_seeds: pictures of a prompt that its scorer expects.
    default_scale: as the pipeline's, 3 for text and 0 for edits.
    """

    open: Callable[[Path], Samples]
    layout: Callable[[dict[str, Any], list[Image.Image]], Files]
    num_seeds: int
    default_scale: int


class BenchmarkPictures:
    """Draws a benchmark's pictures into `folder/scale_N`, which is what its scorer is to be given.

    Pictures are as large as the decoders make them; edits are as large as their source, whose aspect they regain.
    """

    def __init__(self, name: str, drawer: Drawer, folder: str | Path) -> None:
        self.task, self.drawer, self.folder, self.benchmark = name, drawer, Path(folder), BENCHMARKS[name]
        if len(drawer.seeds) != self.benchmark.num_seeds:
            raise ValueError(f"{name} takes {self.benchmark.num_seeds} pictures of a prompt, got seeds {drawer.seeds}")

    def settings(self) -> dict[str, Any]:
        return self.drawer.settings()

    def __call__(self, samples: list[dict[str, Any]]) -> list[Row]:
        inputs = {name: [sample[name] for sample in samples] for name in ("prompt", "image") if name in samples[0]}
        drawn = self.drawer.draw([sample["id"] for sample in samples], resize=False, **inputs)
        for scale, groups in drawn.items():
            for sample, pictures in zip(samples, groups, strict=True):
                for name, content in self.benchmark.layout(sample, pictures).items():
                    _write(self.folder / f"scale_{scale}" / name, content)
        return [{"id": sample["id"]} for sample in samples]

    def scores(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        return {}


def _write(file: Path, content: Image.Image | str) -> None:
    """A whole file or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as unfinished:
        if isinstance(content, str):
            unfinished.write_text(content, encoding="utf-8")
        else:
            content.save(unfinished, format="PNG")


def open_geneval(path: Path) -> Samples:
    """`evaluation_metadata.jsonl`: a prompt and what must be seen on each line."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    prompts = [json.loads(line)["prompt"] for line in lines]

    def read(index: int) -> dict[str, Any]:
        return {"prompt": prompts[index], "metadata": lines[index]}

    return _samples(path, range(len(lines)), read, lines)


def geneval_layout(sample: dict[str, Any], pictures: list[Image.Image]) -> Files:
    """`00042/metadata.jsonl` with the prompt's line and `00042/samples/00000.png` .."""
    folder = f"{sample['id']:05d}"
    samples = {f"{folder}/samples/{index:05d}.png": picture for index, picture in enumerate(pictures)}
    return {**samples, f"{folder}/metadata.jsonl": sample["metadata"]}


def open_dpg(path: Path) -> Samples:
    """`dpg_bench/prompts`: a prompt in each text file."""
    prompts = {file.stem: file.read_text(encoding="utf-8").strip() for file in sorted(path.glob("*.txt"))}
    return _samples(path, prompts, lambda name: {"prompt": prompts[name]}, list(prompts.items()))


def dpg_layout(sample: dict[str, Any], pictures: list[Image.Image]) -> Files:
    """`NAME.png`, the four pictures of a prompt as one of two rows; `--resolution` of the scorer is a side of one."""
    return {f"{sample['id']}.png": make_image_grid(pictures, 2, 2)}


def open_imgedit(path: Path) -> Samples:
    """`basic_edit.json` in the folder of the original pictures."""
    file = path / "basic_edit.json" if path.is_dir() else path
    edits = json.loads(file.read_text(encoding="utf-8"))

    def read(key: str) -> dict[str, Any]:
        return {"prompt": edits[key]["prompt"], "image": read_picture(file.parent / edits[key]["id"])}

    return _samples(file, edits, read, [(key, edit["prompt"], edit["id"]) for key, edit in edits.items()])


def imgedit_layout(sample: dict[str, Any], pictures: list[Image.Image]) -> Files:
    """`KEY.png`."""
    return {f"{sample['id']}.png": _as_source(pictures[0], sample["image"])}


def open_gedit(path: Path) -> Samples:
    """The data set of the Hub, as parquet or `save_to_disk`."""
    names = ["key", "task_type", "instruction", "instruction_language", "input_image"]
    table = open_table(path, "train" if (path / "dataset_dict.json").is_file() else None)
    absent = [name for name in names if name not in table.column_names]
    if absent:
        raise ValueError(f"{path} is not GEdit-Bench: it has no column {absent[0]}, only {table.column_names}")
    pictures, table = table.select_columns(["input_image"]), table.select_columns(names[:-1])

    def read(index: int) -> dict[str, Any]:
        row = table[index]
        return {**row, "prompt": row["instruction"], "image": read_cell(pictures, index, path)}

    return _samples(path, range(len(table)), read, table.to_list())


def gedit_layout(sample: dict[str, Any], pictures: list[Image.Image]) -> Files:
    """`fullset/TASK/LANGUAGE/KEY.png` with the source beside it as `KEY_SRCIMG.png`."""
    name = f"fullset/{sample['task_type']}/{sample['instruction_language']}/{sample['key']}"
    return {f"{name}_SRCIMG.png": sample["image"], f"{name}.png": _as_source(pictures[0], sample["image"])}


def _as_source(picture: Image.Image, source: Image.Image) -> Image.Image:
    return picture.resize(source.size, Image.Resampling.BICUBIC)


def _samples(path: Path, ids, read: Callable[[Any], dict[str, Any]], known: list) -> Samples:
    if not len(ids):
        raise ValueError(f"{path} holds no prompts")
    return Samples(list(ids), read, source_of(path, None, known))


BENCHMARKS = {
    "geneval": PictureBenchmark(open_geneval, geneval_layout, num_seeds=4, default_scale=TEXT_SCALE),
    "dpg": PictureBenchmark(open_dpg, dpg_layout, num_seeds=4, default_scale=TEXT_SCALE),
    "imgedit": PictureBenchmark(open_imgedit, imgedit_layout, num_seeds=1, default_scale=IMAGE_SCALE),
    "gedit": PictureBenchmark(open_gedit, gedit_layout, num_seeds=1, default_scale=IMAGE_SCALE),
}


def open_benchmark(name: str, path: str | Path) -> Samples:
    """The prompts of one of `BENCHMARKS`, in the order of its files.

    Raises:
        ValueError: files that are not that benchmark's.
    """
    try:
        return BENCHMARKS[name].open(Path(path))
    except (KeyError, IsADirectoryError, FileNotFoundError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not what {name} publishes ({error}): {BENCHMARKS[name].open.__doc__}") from error
