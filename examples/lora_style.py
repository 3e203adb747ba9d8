"""Teach a decoder a new style through LoRA, on drawings made from pictures: an adapter of 2.6 MB.

    python examples/lora_style.py --model hub_configs/puma-emoji --data data/emoji --out runs/cyanotype

The decoder gets the features of a picture and learns to draw its cyanotype, white on blue. The language model,
the encoder and the decoder's own weights stay as they are, so whatever the model can draw it can then draw so. OUT
holds the adapter, `before_after.png`, and `results.json` with the distance to true cyanotypes before and after. The
same command again goes on from the last whole checkpoint.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from datasets import load_from_disk
from diffusers import DDPMScheduler
from peft import LoraConfig
from PIL import Image

from diffusers_puma import PumaPipeline
from diffusers_puma.contact_sheet import contact_sheet
from diffusers_puma.training import PumaDecoderTrainer, PumaDecoderTrainingArguments

PAPER = np.array([0.06, 0.20, 0.50], dtype=np.float32)  # Prussian blue
LAYERS = (
    r".*(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2|proj_in|proj_out|conv1|conv2|conv_in|conv_out|time_emb_proj)"
)
PROMPTS = ["tangerine in noto style", "green heart in twemoji style", "glowing star in fluent 3d style"]
ADAPTER = "style"
WEIGHTS = "pytorch_lora_weights.safetensors"


def cyanotype(picture: Image.Image) -> Image.Image:
    """As sunlight prints it: the white paper blue, and the lighter the farther from white a pixel is."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    # Colours count in full, greys and blacks by their darkness.
    ink = 1 - (pixels.min(-1, keepdims=True) + pixels.mean(-1, keepdims=True)) / 2
    return Image.fromarray((255 * (PAPER + (1 - PAPER) * ink)).round().astype(np.uint8))


@torch.no_grad()
def make_rows(pipe: PumaPipeline, pictures: list[Image.Image]) -> list[dict[str, torch.Tensor]]:
    """Training rows: features of the pictures, and latents of their cyanotypes."""
    rows = []
    for start in range(0, len(pictures), 64):
        batch = pictures[start : start + 64]
        features = pipe.encode_image(batch)[0]
        drawings = pipe.image_processor.preprocess([cyanotype(picture) for picture in batch])
        latents = pipe.vae.encode(drawings.to(pipe.device)).latent_dist.mode() * pipe.vae.config.scaling_factor
        pairs = zip(latents.cpu(), features.cpu(), strict=True)
        rows += [{"latents": l, "features": f} for l, f in pairs]  # noqa: E741
    return rows


def train(pipe: PumaPipeline, rows: list[dict], arguments: argparse.Namespace) -> PumaDecoderTrainer:
    unet = getattr(pipe, f"unet_{arguments.scale}").requires_grad_(False)
    unet.add_adapter(LoraConfig(r=arguments.rank, lora_alpha=arguments.rank, target_modules=LAYERS), ADAPTER)
    settings = PumaDecoderTrainingArguments(
        str(arguments.out),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        noise_offset=0.0,  # as this decoder was trained
        ema_decay=0.0,
        logging_steps=20,
        save_steps=100,
        save_total_limit=1,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    trainer = PumaDecoderTrainer(
        unet, settings, noise_scheduler=scheduler, null_features=pipe.black_image_features()[0], train_dataset=rows
    )
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    return trainer


def draw(pipe: PumaPipeline, scale: int, **source) -> list[Image.Image]:
    return pipe(**source, scale=scale, generator=torch.Generator().manual_seed(0)).images


def distance(drawings: list[Image.Image], pictures: list[Image.Image]) -> float:
    """Root mean squared difference to the cyanotypes of the pictures, of 255."""
    differences = [
        np.asarray(drawn, dtype=float) - np.asarray(cyanotype(picture).resize(drawn.size), dtype=float)
        for drawn, picture in zip(drawings, pictures, strict=True)
    ]
    return float(np.sqrt(np.mean(np.square(differences))))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="hub_configs/puma-emoji")
    parser.add_argument("--data", default="data/emoji", help="folder that examples/emoji/build_dataset.py wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/cyanotype"))
    parser.add_argument("--scale", type=int, default=3, help="whose decoder")
    parser.add_argument("--pictures", type=int, default=2048, help="how many to train on")
    parser.add_argument("--held_out", type=int, default=16, help="how many unseen pictures to measure on")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args(argv)
    if arguments.scale not in range(5):
        parser.error(f"--scale must be 0 to 4, got {arguments.scale}")

    splits = load_from_disk(arguments.data)
    train_split, held_out_split = splits["train"].shuffle(seed=0), splits["heldout_concept"].shuffle(seed=0)
    pictures = train_split.select(range(min(arguments.pictures, len(train_split))))["image"][:]
    held_out = held_out_split.select(range(min(arguments.held_out, len(held_out_split))))["image"][:]
    pipe = PumaPipeline.from_pretrained(arguments.model, scales=[arguments.scale], dtype=torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe.to(device).set_progress_bar_config(disable=True)

    before = [draw(pipe, arguments.scale, prompt=PROMPTS), draw(pipe, arguments.scale, image=held_out)]
    trainer = train(pipe, make_rows(pipe, pictures), arguments)
    # What a user gets: the plain model, and the file.
    pipe = PumaPipeline.from_pretrained(arguments.model, scales=[arguments.scale], dtype=torch.float32)
    pipe.to(device).set_progress_bar_config(disable=True)
    pipe.load_lora_weights(arguments.out, scale=arguments.scale, adapter_name=ADAPTER)
    after = [draw(pipe, arguments.scale, prompt=PROMPTS), draw(pipe, arguments.scale, image=held_out)]

    labels = [f'"{prompt}"' for prompt in PROMPTS] + ["an unseen picture, decoded again"]
    pairs = [[*pair] for pair in zip(before[0] + before[1][:1], after[0] + after[1][:1], strict=True)]
    sheet = contact_sheet(list(zip(labels, pairs, strict=True)), ["before", "after"])
    sheet.save(arguments.out / "before_after.png")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    results = {
        "adapter_bytes": (arguments.out / WEIGHTS).stat().st_size,
        "steps": trainer.state.global_step,
        "first_loss": float(losses[0]),
        "last_loss": float(losses[-1]),
        "distance_before": distance(before[1], held_out),
        "distance_after": distance(after[1], held_out),
    }
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
