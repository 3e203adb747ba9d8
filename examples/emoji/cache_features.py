"""Encode every picture once: encoder features and VAE latents, for the stages that train on them.

    python examples/emoji/cache_features.py --data data/emoji --scenes data/emoji-scenes \
        --encoder runs/emoji/encoder --vae runs/emoji/vae --out runs/emoji/cache
"""

import argparse
import os
import shutil
from pathlib import Path

import torch
from build_dataset import load_emoji, to_uint8
from build_scenes import load_scenes
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPVisionModel

from transformers_puma import PumaImageProcessor

# The pictures are at the encoder's own size, so CLIP's mean and deviation are all of its preprocessing.
MEAN, STD = (
    torch.tensor(values)[:, None, None] for values in (PumaImageProcessor.image_mean, PumaImageProcessor.image_std)
)


@torch.no_grad()
def encode(encoder: CLIPVisionModel, vae: AutoencoderKL, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """`pixels` (B, 3, H, W) in [0, 1] -> `features` (B, k_0, C) and scaled `latents` (B, 4, h, w), in half
    precision."""
    features = encoder(((pixels - MEAN) / STD).to(encoder.device)).last_hidden_state[:, 1:]
    latents = vae.encode((2 * pixels - 1).to(vae.device)).latent_dist.mode() * vae.config.scaling_factor
    return {"features": features.half().cpu(), "latents": latents.half().cpu()}


def cache(pixels: torch.Tensor, encoder: CLIPVisionModel, vae: AutoencoderKL, name: str) -> dict[str, torch.Tensor]:
    """`encode` of uint8 `pixels` (n, H, W, 3), batch by batch."""
    batches = tqdm(pixels.split(128), desc=f"encoding {name}")
    parts = [encode(encoder, vae, batch.permute(0, 3, 1, 2).float() / 255) for batch in batches]
    return {key: torch.cat([part[key] for part in parts]).contiguous() for key in parts[0]}


def load_cache(folder: str, split: str) -> dict[str, torch.Tensor]:
    """`features` (n, k_0, C), `latents` (n, 4, h, w) and `null_features` (1, k_0, C) of the black picture.

    `split` is one of the emoji data, or one of the scenes with "scenes_" before it.
    """
    return load_file(Path(folder, f"{split}.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data/emoji")
    parser.add_argument("--scenes", default="data/emoji-scenes")
    parser.add_argument("--encoder", default="runs/emoji/encoder")
    parser.add_argument("--vae", default="runs/emoji/vae")
    parser.add_argument("--out", default="runs/emoji/cache")
    arguments = parser.parse_args()
    if Path(arguments.out).exists():
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = CLIPVisionModel.from_pretrained(arguments.encoder).to(device).eval()
    vae = AutoencoderKL.from_pretrained(arguments.vae).to(device).eval()

    partial = Path(f"{arguments.out}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    size = encoder.config.image_size
    null_features = encode(encoder, vae, torch.zeros(1, 3, size, size))["features"].contiguous()
    splits = load_emoji(arguments.data)
    splits |= {f"scenes_{name}": split for name, split in load_scenes(arguments.scenes).items()}
    for name, split in splits.items():
        tensors = cache(torch.from_numpy(to_uint8(split)), encoder, vae, name)
        save_file({**tensors, "null_features": null_features}, partial / f"{name}.safetensors")
    os.replace(partial, arguments.out)


if __name__ == "__main__":
    main()
