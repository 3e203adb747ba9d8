"""Train the VAE: 64 x 64 pixels <-> a 16 x 16 grid of 4 latent channels.

    python examples/emoji/train_vae.py --data data/emoji --out runs/emoji/vae

With `--pretrained` the decoder of a trained VAE is trained on alone: its latents stay what the UNets know.

The loss is L1 + 2 MSE + 0.3 L1 of the image gradient (which keeps thin outlines) and a small KL term; no adversary.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from emoji_training import (
    EmojiPictures,
    EmojiTrainer,
    compose_pairs,
    count_parameters,
    draw_colouring,
    jitter,
    load_pictures,
    parse_arguments,
    psnr,
    psnr_where,
    recolour,
    run_stage,
)
from torch import nn

PRESETS = {
    "cpu": dict(
        max_steps=4300,
        per_device_train_batch_size=8,
        learning_rate=1.5e-3,
        warmup_steps=100,
        lr_scheduler_type="cosine",
        save_steps=400,
    ),
    "gpu": dict(
        max_steps=20000,
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        warmup_steps=500,
        lr_scheduler_type="cosine",
        save_steps=2000,
    ),
}
SCENE_FRACTION = 0.25
MSE_WEIGHT, GRADIENT_WEIGHT, KL_WEIGHT = 2.0, 0.3, 1e-6


@dataclass
class VAEArguments:
    pretrained: str | None = field(default=None, metadata={"help": "a VAE of which the decoder is trained on"})


def build_vae(channels: tuple[int, ...] = (16, 48, 96), size: int = 64) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=size,
        force_upcast=False,
    )


def load_vae(folder: str) -> AutoencoderKL:
    """A trained VAE of which the decoder alone is to be trained."""
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    return vae


def gradient_l1(error: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference between neighbours in both directions, of an error (B, C, H, W)."""
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


class VAETask(nn.Module):
    """The autoencoder with its training loss."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """`pixels` (B, 3, H, W) in [0, 1]."""
        sample = 2 * pixels - 1
        posterior = self.vae.encode(sample).latent_dist
        error = self.vae.decode(posterior.sample()).sample.float() - sample
        reconstruction = error.abs().mean() + MSE_WEIGHT * error.square().mean() + GRADIENT_WEIGHT * gradient_l1(error)
        kl = posterior.kl().float().mean()
        decibel = psnr(error / 2, torch.zeros_like(error)).mean()
        return {"loss": reconstruction + KL_WEIGHT * kl, "kl": kl, "psnr": decibel}


class VAETrainer(EmojiTrainer):
    def make_batch(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        pixels = self.pictures[rows]
        scenes = int(len(rows) * SCENE_FRACTION)
        pixels = torch.cat([compose_pairs(pixels[:scenes], torch.rand(scenes) < 0.5), jitter(pixels[scenes:])])
        return {"pixels": recolour(pixels, draw_colouring(len(rows)))}


@torch.no_grad()
def latent_std(vae: AutoencoderKL, pictures: EmojiPictures, count: int = 2048) -> float:
    """Standard deviation of sampled latents over `count` pictures spread evenly over the split."""
    rows = torch.arange(0, len(pictures), max(1, len(pictures) // count))
    return (
        torch.cat([vae.encode(2 * pictures[part].to(vae.device) - 1).latent_dist.sample() for part in rows.split(64)])
        .std()
        .item()
    )


@torch.no_grad()
def round_trip(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in [0, 1] -> the mean latent -> pixels in [0, 1]."""
    latents = vae.encode(2 * pixels.to(vae.device) - 1).latent_dist.mode()
    return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).cpu()


def measure(vae: AutoencoderKL, pictures: EmojiPictures) -> dict[str, float]:
    """Mean PSNR in dB of the round trip over all pictures, over all pixels and over those that are not white."""
    everywhere, drawn = [], []
    for rows in torch.arange(len(pictures)).split(64):
        pixels = pictures[rows]
        output = round_trip(vae, pixels)
        everywhere.append(psnr(output, pixels))
        drawn.append(psnr_where(output, pixels, (pixels < 1).any(dim=1, keepdim=True)))
    return {"psnr": torch.cat(everywhere).mean().item(), "psnr_not_white": torch.cat(drawn).mean().item()}


def main(argv: list[str] | None = None) -> None:
    stage, training, options = parse_arguments("vae", PRESETS, argv, extra=VAEArguments)
    if Path(stage.out).exists():
        print(f"{stage.out} is trained already")
        return
    torch.manual_seed(training.seed)
    pictures = load_pictures(stage.data)
    vae = load_vae(options.pretrained) if options.pretrained else build_vae()
    trainer = VAETrainer(model=VAETask(vae), args=training, pictures=pictures["train"])

    def save(folder: str) -> dict:
        if options.pretrained is None:
            vae.register_to_config(scaling_factor=1 / latent_std(vae, pictures["train"]))
        vae.save_pretrained(folder)
        held_out = measure(vae, pictures["heldout_concept"])
        std = 1 / vae.config.scaling_factor
        return {"parameters": count_parameters(vae), "latent_std": std, "heldout_concept": held_out}

    run_stage(trainer, stage.out, save)


if __name__ == "__main__":
    main()
