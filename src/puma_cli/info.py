"""`puma info`: what a model folder holds, read from configs and from the headers of weight files. Loads no weight."""

import argparse
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from puma_files import read_json, read_safetensors_header

from .errors import UserError
from .model_source import CONFIG, ModelSource, find_model

WHOLE_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
# What a language model's weights belong to, by how their names start; the first that fits.
LANGUAGE_MODEL_PARTS = {
    "model.vision_tower.": "encoder",
    "model.language_model.": "language model",
    "": "projector and heads",
}

Tensors = dict[str, dict[str, Any]]
Row = tuple[str, str, str, str, str]


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("info", help="what a model folder holds", description=__doc__)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="model folder (default: that of the checkout)")


def run(args: argparse.Namespace) -> None:
    model = find_model(args.model)
    folder = Path(model.name)
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder} (a model on the Hub must be downloaded first)")
    # Pipelines have lists of other things in their index too.
    components = [name for name in model.components if isinstance(model.index[name][0], str)]
    parts = {name: folder / name for name in components} or {_kind(model): folder}
    for name in [*(f"unet_{scale}" for scale in model.decoders), *(["vae"] if model.decoders else [])]:
        if not (folder / name / CONFIG).is_file():
            raise UserError(f"{folder / name / CONFIG} is missing: the folder is not complete")
    tensors = {name: _read_weights(part) for name, part in parts.items()}
    print("\n".join([*_summary(model, folder, tensors), "", *_table(_rows(model, parts, tensors))]))


def _kind(model: ModelSource) -> str:
    """What a folder is that holds no pipeline."""
    name = _class_name(model.config)
    return "mllm" if model.config.get("model_type") == "puma" else "decoder" if "UNet" in name else name


def _class_name(config: dict[str, Any]) -> str:
    return config.get("_class_name") or (config.get("architectures") or ["?"])[0]


def _numbers(config: dict[str, Any], *names: str) -> list[int] | None:
    """These entries of a config; None unless all are there, since models of other kinds have others, or lists."""
    values = [config.get(name) for name in names]
    return values if all(isinstance(value, int) for value in values) else None


def _summary(model: ModelSource, folder: Path, tensors: dict[str, Tensors]) -> Iterator[str]:
    every = [tensor for part in tensors.values() for tensor in part.values()]
    yield f"{folder}: {_count(every):,} parameters, {_size(every)}"
    vision = model.config.get("vision_config") or _read_config(folder / "image_encoder")
    if numbers := _numbers(vision, "image_size", "patch_size", "hidden_size"):
        size, patch_size, channels = numbers
        grid = size // patch_size
        yield (
            f"encoder: {size} x {size} pixels -> {grid} x {grid} tokens of {channels} channels"
            + (f", {model.config['num_scales']} scales" if "num_scales" in model.config else "")
        )
    blocks = _read_config(folder / "vae").get("block_out_channels")
    if model.decoders and not blocks:
        raise UserError(f"{folder / 'vae' / CONFIG} describes no VAE of PUMA's: it has no block_out_channels")
    for scale in model.decoders:
        part = folder / f"unet_{scale}"
        numbers = _numbers(_read_config(part), "num_tokens", "sample_size")
        if numbers is None:
            raise UserError(f"{part / CONFIG} describes no decoder of PUMA: it needs num_tokens and sample_size")
        size = numbers[1] * 2 ** (len(blocks) - 1)
        yield f"scale {scale}: {numbers[0]} tokens -> {size} x {size} pixels"
    if "default_num_inference_steps" in model.index:
        yield f"denoising steps by default: {model.index['default_num_inference_steps']}"


def _rows(model: ModelSource, parts: dict[str, Path], tensors: dict[str, Tensors]) -> Iterator[Row]:
    yield "part", "class", "parameters", "format", "size"
    for name, folder in parts.items():
        entry = model.index.get(name) or [None, _class_name(_read_config(folder))]
        yield _row(name, entry[1], list(tensors[name].values()))
        if name == "mllm":
            groups: dict[str, list] = {label: [] for label in LANGUAGE_MODEL_PARTS.values()}
            for key, tensor in tensors[name].items():
                prefix = next(start for start in LANGUAGE_MODEL_PARTS if key.startswith(start))
                groups[LANGUAGE_MODEL_PARTS[prefix]].append(tensor)
            for label, group in groups.items():
                yield _row(f"  {label}", "", group)


def _row(name: str, kind: str, tensors: list[dict[str, Any]]) -> Row:
    if not tensors:
        return name, kind, "", "", ""
    formats = Counter(tensor["dtype"] for tensor in tensors)
    return name, kind, f"{_count(tensors):,}", "/".join(sorted(formats)), _size(tensors)


def _table(rows: Iterator[Row]) -> Iterator[str]:
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        name, kind, parameters, formats, size = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield f"{name}  {kind}  {parameters.strip():>{widths[2]}}  {formats}  {size.strip():>{widths[4]}}".rstrip()


def _count(tensors: list[dict[str, Any]]) -> int:
    return sum(math.prod(tensor["shape"]) for tensor in tensors)


def _size(tensors: list[dict[str, Any]]) -> str:
    size = sum(tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in tensors)
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    return read_json(file) if file.is_file() else {}


def _read_weights(folder: Path) -> Tensors:
    """Name -> dtype, shape and offsets of each tensor in a folder's weight files, whole or in shards."""
    files = sorted(folder.glob("*.safetensors"))
    whole = [file for file in files if file.name in WHOLE_FILES]
    return {name: tensor for file in whole or files for name, tensor in read_safetensors_header(file).items()}
