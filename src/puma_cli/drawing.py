"""What `generate` and `reconstruct` share: the pipeline's call, and writing what it draws. Imports the libraries."""

import argparse
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from diffusers_puma import PumaPipeline
from diffusers_puma.contact_sheet import contact_sheet
from diffusers_puma.pipeline_inputs import as_schedules

from .loading import load_pipeline, quiet_libraries
from .model_source import ModelSource
from .pictures import write_png

Pictures = list[Image.Image] | dict[int, list[Image.Image]]
LARGEST_CELL = 512


def load_for(args: argparse.Namespace, model: ModelSource, default_scale: int) -> PumaPipeline:
    """The pipeline with the decoders that `args.scale` asks for."""
    schedules = as_schedules(args.scale, model.decoders, model.decoders, default_scale)
    scales = sorted({scale for schedule in schedules for _, scale in schedule})
    return load_pipeline(model, scales, args.device, args.dtype)


class Sampling(Protocol):
    """A command's arguments, or a request's fields; None is the pipeline's default, and of the seed a random one."""

    scale: Any
    seed: int | None
    steps: int | None
    guidance: float | None


def draw(pipe: PumaPipeline, args: Sampling, **inputs: Any) -> Pictures:
    """One call of the pipeline."""
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    given = {name: value for name, value in options.items() if value is not None}
    # Noise is drawn on the CPU, so that a seed gives the same picture on every device.
    generator = None if args.seed is None else torch.Generator().manual_seed(args.seed)
    with quiet_libraries():
        return pipe(**inputs, **given, scale=args.scale, generator=generator).images


def write_pictures(pictures: Pictures, output: Path, label: str, given: list[Image.Image]) -> None:
    """Writes one picture, or for a dict one sheet and one file per scale, and prints the paths.

    Args:
        label: of the sheet's row.
        given: pictures that the sheet shows before those of the scales.
    """
    if not isinstance(pictures, dict):
        return _write(pictures[0], output)
    row = given + [images[0] for images in pictures.values()]
    titles = ["given"] * len(given) + [f"scale {scale}" for scale in pictures]
    cell = min(max(*pictures[min(pictures)][0].size, 128), LARGEST_CELL)
    _write(contact_sheet([(label, row)], titles, cell), output)
    for scale, images in pictures.items():
        _write(images[0], output.with_name(f"{output.stem}_{scale}{output.suffix}"))


def _write(picture: Image.Image, output: Path) -> None:
    write_png(picture, output)
    print(output)
