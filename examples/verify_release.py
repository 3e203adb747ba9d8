"""Checks converted decoders against the released ones: the same numbers from both, for all five token counts.

    python examples/verify_release.py RELEASE PICTURE

RELEASE is a download of the Hub repository `LucasFang/PUMA` (or tests/parity/data/official_release_tiny). It is
converted into a temporary folder next to it, unless `--converted` names a folder that `puma convert` has made already.
Each decoder is then run twice: through `PumaPipeline`, and directly with nothing but stock classes of transformers and
diffusers on the release's files, in fp32. Where the release holds `expected.safetensors`, the pipeline is also
compared with those numbers. The table holds maximal absolute differences; the exit status is 1 if any is above its
tolerance.

An SDXL-sized decoder takes about 10 GB in fp32, one at a time. Without a GPU choose few `--steps`.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPVisionModel

from diffusers_puma import PumaPipeline, convert_released_decoders
from diffusers_puma.conversion import DECODERS, IMAGE_ENCODER, RELEASE_CONFIG_KEYS, TOKEN_COUNTS, UNUSED, read_weights

TOLERANCES = {"pooled": 1e-5, "null_pooled": 1e-5, "unet_out": 1e-4, "image": 1e-4}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

Results = dict[str, torch.Tensor]


@dataclass
class Settings:
    """What both computations share; the names are those of `expected.json`. Sizes in pixels."""

    timestep: int = 500
    num_inference_steps: int = 4
    guidance_scale: float = 2.0
    height: int = 1024
    width: int = 1024
    seed_generator: int = 7


@torch.no_grad()
def direct_results(
    release: Path, picture: Image.Image, count: int, latents: torch.Tensor, settings: Settings
) -> Results:
    """The `count`-token decoder in stock classes, written out.

    Args:
        latents: (1, 4, h, w) start latents, on the device to compute on.

    Returns:
        `pooled` and `null_pooled` (1, count, C), `unet_out` (2, 4, h, w) for [conditional, unconditional] at the
        timestep, `image` (1, 3, height, width) in [0, 1].
    """
    device = latents.device
    encoder = CLIPVisionModel.from_pretrained(release / IMAGE_ENCODER, dtype=torch.float32).to(device)
    pooled, null_pooled = (
        _pool(encoder(_preprocess(item, encoder.config.image_size).to(device)).last_hidden_state[:, 1:], count)
        for item in (picture, Image.new("RGB", picture.size))
    )
    unet, projection, position_table = _stock_unet(release / DECODERS / f"unet_{count}", device)
    states = torch.cat([projection(pooled) + position_table, projection(null_pooled)])

    def evaluate(sample: torch.Tensor, timestep: int | torch.Tensor) -> torch.Tensor:
        return unet(sample.repeat(2, 1, 1, 1), timestep, states).sample

    unet_out = evaluate(latents, settings.timestep)
    scheduler = DDPMScheduler.from_pretrained(release / DECODERS / "scheduler")
    scheduler.set_timesteps(settings.num_inference_steps)
    generator = torch.Generator().manual_seed(settings.seed_generator)
    for timestep in scheduler.timesteps:
        conditional, unconditional = evaluate(latents, timestep).chunk(2)
        noise = unconditional + settings.guidance_scale * (conditional - unconditional)
        latents = scheduler.step(noise, timestep, latents, generator=generator).prev_sample
    vae = AutoencoderKL.from_pretrained(release / DECODERS / "vae").to(device)
    image = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    return {"pooled": pooled, "null_pooled": null_pooled, "unet_out": unet_out, "image": image}


@torch.no_grad()
def converted_results(
    folder: Path, picture: Image.Image, count: int, latents: torch.Tensor, settings: Settings
) -> Results:
    """The same numbers as `direct_results` through the saved pipeline in `folder`."""
    scale = TOKEN_COUNTS.index(count)
    pipe = PumaPipeline.from_pretrained(folder, scales=[scale]).to(latents.device)
    output = pipe(
        image=picture,
        scale=scale,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        height=settings.height,
        width=settings.width,
        latents=latents,
        generator=torch.Generator().manual_seed(settings.seed_generator),
        output_type="pt",
    )
    pooled, null_pooled = output.image_features[scale], pipe.black_image_features()[scale]
    unet = getattr(pipe, f"unet_{scale}")
    conditional = torch.tensor([True, False], device=latents.device)
    unet_out = unet(
        latents.repeat(2, 1, 1, 1),
        settings.timestep,
        torch.cat([pooled, null_pooled]),
        added_cond_kwargs={"conditional": conditional},
    ).sample
    return {"pooled": pooled, "null_pooled": null_pooled, "unet_out": unet_out, "image": output.images}


def max_errors(found: Results, expected: Results) -> dict[str, float]:
    """Maximal absolute difference of each entry."""
    return {name: (found[name].cpu() - expected[name].cpu()).abs().max().item() for name in TOLERANCES}


def table(rows: list[tuple[str, int, dict[str, float]]]) -> str:
    """Rows of (what is compared, token count, errors) as text."""
    lines = [f"{'max abs error':<28}{'tokens':>8}" + "".join(f"{name:>13}" for name in TOLERANCES)]
    for label, count, errors in rows:
        lines.append(f"{label:<28}{count:>8}" + "".join(f"{errors[name]:>13.1e}" for name in TOLERANCES))
    return "\n".join([*lines, f"{'tolerance':<36}" + "".join(f"{value:>13.0e}" for value in TOLERANCES.values())])


def within_tolerance(rows: list[tuple[str, int, dict[str, float]]]) -> bool:
    return all(errors[name] <= bound for _, _, errors in rows for name, bound in TOLERANCES.items())


def expected_results(release: Path, count: int) -> tuple[torch.Tensor, Results]:
    """Start latents and the authors' numbers for one decoder, of a release that holds them."""
    numbers = load_file(release / "expected.safetensors")
    return numbers[f"unet_in_{count}"], {name: numbers[f"{name}_{count}"] for name in TOLERANCES}


def _preprocess(picture: Image.Image, size: int) -> torch.Tensor:
    pixels = np.array(picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    pixels = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    return ((pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None])[None]


def _pool(features: torch.Tensor, count: int) -> torch.Tensor:
    side = round(features.shape[1] ** 0.5)
    grid = features.transpose(1, 2).unflatten(2, (side, side))
    while grid.shape[2] ** 2 > count:
        grid = F.avg_pool2d(grid, kernel_size=2, stride=2)
    return grid.flatten(2).transpose(1, 2)


def _stock_unet(folder: Path, device: torch.device) -> tuple[UNet2DConditionModel, nn.Linear, torch.Tensor]:
    """The released UNet as the stock class, its `mapping_layer`, and its position table (0 where it has none)."""
    weights = {name: tensor.float() for name, tensor in read_weights(folder).items() if not name.startswith(UNUSED)}
    position_table = weights.pop("embed_img_pos", torch.zeros(()))
    weight, bias = weights.pop("mapping_layer.weight"), weights.pop("mapping_layer.bias")
    projection = nn.Linear(weight.shape[1], weight.shape[0])
    projection.load_state_dict({"weight": weight, "bias": bias})

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {name: value for name, value in config.items() if name not in RELEASE_CONFIG_KEYS}
    unet = UNet2DConditionModel.from_config({**config, "addition_embed_type": None})
    unet.load_state_dict(weights)
    return unet.eval().to(device), projection.to(device), position_table.to(device)


def verify(release: Path, converted: Path, picture: Image.Image, settings: Settings, device: str) -> bool:
    """Prints the table and tells whether every entry is within its tolerance."""
    has_reference = (release / "expected.safetensors").is_file()
    rows = []
    for count in TOKEN_COUNTS:
        if has_reference:
            latents, reference = expected_results(release, count)
        else:
            shape = (1, 4, settings.height // 8, settings.width // 8)
            latents = torch.randn(shape, generator=torch.Generator().manual_seed(settings.seed_generator))
        arguments = (picture, count, latents.to(device), settings)
        direct = direct_results(release, *arguments)
        through_pipeline = converted_results(converted, *arguments)
        rows.append(("converted / stock classes", count, max_errors(through_pipeline, direct)))
        if has_reference:
            rows.append(("converted / authors' code", count, max_errors(through_pipeline, reference)))
    print(table(rows))
    return within_tolerance(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", type=Path, help="folder that holds ckpts/")
    parser.add_argument("picture", type=Path, help="any picture; with expected.safetensors, the one it is for")
    parser.add_argument("--converted", type=Path, help="folder that `puma convert` has made of the release")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps (default 4)")
    parser.add_argument("--size", type=int, default=1024, help="height and width in pixels (default 1024)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)

    # Both computations are meant in fp32; convolutions on a GPU would use fewer digits.
    torch.backends.cudnn.allow_tf32 = False
    picture = Image.open(options.picture).convert("RGB")
    settings = Settings(num_inference_steps=options.steps, height=options.size, width=options.size)
    if (options.release / "expected.json").is_file():
        settings = Settings(**json.loads((options.release / "expected.json").read_text(encoding="utf-8")))
    if options.converted is not None:
        return 0 if verify(options.release, options.converted, picture, settings, options.device) else 1
    with tempfile.TemporaryDirectory(dir=options.release.absolute().parent) as temporary:
        convert_released_decoders(options.release, Path(temporary) / "converted")
        return 0 if verify(options.release, Path(temporary) / "converted", picture, settings, options.device) else 1


if __name__ == "__main__":
    sys.exit(main())
