"""Encode every picture once: encoder features and VAE latents, for the stages that train on them.

    python examples/emoji/cache_features.py --data data/emoji --encoder runs/emoji/encoder --vae runs/emoji/vae \
        --out runs/emoji/cache
"""

import argparse
import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from emoji_training import EmojiPictures, load_pictures
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


def cache(pictures: EmojiPictures, encoder: CLIPVisionModel, vae: AutoencoderKL, name: str) -> dict[str, torch.Tensor]:
    batches = torch.arange(len(pictures)).split(128)
    parts = [encode(encoder, vae, pictures[rows]) for rows in tqdm(batches, desc=f"encoding {name}")]
    return {key: torch.cat([part[key] for part in parts]).contiguous() for key in parts[0]}


def load_cache(folder: str, split: str) -> dict[str, torch.Tensor]:
    """`features` (n, k_0, C), `latents` (n, 4, h, w) and `null_features` (1, k_0, C) of the black picture."""
    return load_file(Path(folder, f"{split}.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data/emoji")
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
    for split, pictures in load_pictures(arguments.data).items():
        tensors = cache(pictures, encoder, vae, split)
        save_file({**tensors, "null_features": null_features}, partial / f"{split}.safetensors")
    os.replace(partial, arguments.out)


if __name__ == "__main__":
    main()
