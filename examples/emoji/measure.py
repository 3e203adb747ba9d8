"""Measure a small PUMA on pictures and pairs that no training saw:

    python examples/emoji/measure.py --model hub_configs/puma-emoji --data data/emoji --out hub_configs/puma-emoji

Writes `results.json`, and `reconstruction.png` and `text_to_image.png` with random held-out examples.
"""

import argparse
import json
from pathlib import Path

import torch
from emoji_questions import STYLE, WHAT
from emoji_training import EmojiPictures, load_pictures, psnr, psnr_where
from emoji_words import caption
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from diffusers_puma import PumaPipeline
from diffusers_puma.contact_sheet import contact_sheet

SHOWN = 14  # examples on a sheet


def spread(pictures: EmojiPictures, count: int) -> torch.Tensor:
    """Random rows, one of each concept and style, so that variants of people don't crowd out the rest."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randperm(len(pictures.group_sizes), generator=generator)[:count]
    return pictures.group_rows[pictures.group_starts[groups]]


def nearest(pixels: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """For each picture (B, 3, H, W) in [0, 1] the candidate (uint8) of least squared error."""
    best, error = torch.zeros(len(pixels), dtype=torch.long), torch.full((len(pixels),), torch.inf)
    flat = pixels.flatten(1)
    for start in tqdm(range(0, len(candidates), 2048), desc="nearest training picture"):
        part = candidates[start : start + 2048].flatten(1).float() / 255
        values, rows = torch.cdist(flat, part).min(1)
        best, error = torch.where(values < error, rows + start, best), torch.minimum(values, error)
    return candidates[best].float() / 255


def decibel(pixels: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Mean PSNR over all pixels and over those that are not white in the reference."""
    drawn = (reference < 1).any(dim=1, keepdim=True)
    return {
        "psnr": round(psnr(pixels, reference).mean().item(), 2),
        "psnr_not_white": round(psnr_where(pixels, reference, drawn).mean().item(), 2),
    }


@torch.no_grad()
def reconstructions(
    pipe: PumaPipeline, images: list[Image.Image], seed: int, batch: int = 32
) -> dict[int, torch.Tensor]:
    """`{scale: (n, 3, H, W)}` in [0, 1]; picture i has its own generator, so no batching changes it."""
    parts: dict[int, list] = {scale: [] for scale in pipe.scales}
    for start in tqdm(range(0, len(images), batch), desc=f"reconstruction, seed {seed}"):
        group = images[start : start + batch]
        generators = [torch.Generator().manual_seed(seed * 100_000 + start + i) for i in range(len(group))]
        result = pipe(image=group, scale="all", generator=generators, output_type="pt").images
        for scale, pictures in result.items():
            parts[scale].append(pictures.float().cpu())
    return {scale: torch.cat(pictures) for scale, pictures in parts.items()}


@torch.no_grad()
def measure_reconstruction(
    pipe: PumaPipeline, pictures: dict[str, EmojiPictures], count: int
) -> tuple[dict, Image.Image]:
    rows = spread(pictures["heldout_concept"], count)
    truth = pictures["heldout_concept"][rows]
    images = [to_pil_image(picture) for picture in truth]
    first, second = (reconstructions(pipe, images, seed) for seed in (0, 1))
    latents = pipe.vae.encode((2 * truth - 1).to(pipe.vae.dtype)).latent_dist.mode()
    round_trip = (pipe.vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)
    near = nearest(truth, pictures["train"].pixels)
    table = {
        "pictures": len(rows),
        "vae": decibel(round_trip, truth),
        "nearest training picture": decibel(near, truth),
        **{f"scale {scale}": decibel(first[scale], truth) for scale in first},
    }
    for scale in first:
        table[f"scale {scale}"]["psnr_between_seeds"] = round(psnr(first[scale], second[scale]).mean().item(), 2)
    shown = [("original", truth), ("nearest in training", near), ("VAE", round_trip)]
    shown += [(f"scale {scale}", first[scale]) for scale in first]
    sheet = contact_sheet([(title, [to_pil_image(picture) for picture in part[:SHOWN]]) for title, part in shown])
    return table, sheet


@torch.no_grad()
def measure_questions(pipe: PumaPipeline, pictures: EmojiPictures, count: int) -> dict:
    """Share of exact answers; the name of a concept that was never seen cannot be known, its style can."""
    rows = spread(pictures, count).tolist()
    images = [to_pil_image(pictures[torch.tensor([row])][0]) for row in rows]
    shares = {}
    for question, key in ((WHAT, "name"), (STYLE, "style")):
        right = 0
        for start in tqdm(range(0, len(rows), 16), desc=question):
            group = images[start : start + 16]
            answers = pipe.ask(group, [question] * len(group), max_new_tokens=24, do_sample=False)
            right += sum(a == pictures.texts[row][key] for a, row in zip(answers, rows[start:], strict=False))
        shares[question] = round(right / len(rows), 3)
    return shares


def text_to_image_sheet(pipe: PumaPipeline, pictures: EmojiPictures, count: int) -> Image.Image:
    """Random unseen (concept, style) pairs: the true picture and what each scale draws."""
    rows = spread(pictures, count).tolist()
    prompts = [caption(pictures.texts[row]) for row in rows]
    generators = [torch.Generator().manual_seed(row) for row in rows]
    drawn = pipe(prompts, scale="all", generator=generators).images
    truth = [to_pil_image(pictures[torch.tensor([row])][0]) for row in rows]
    sheet = [("true picture", truth)] + [(f"scale {scale}", drawn[scale]) for scale in sorted(drawn, reverse=True)]
    return contact_sheet(sheet, column_titles=prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("hub_configs/puma-emoji"))
    parser.add_argument("--data", default="data/emoji")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji/results"))
    parser.add_argument("--count", type=int, default=256, help="pictures of unseen concepts to reconstruct")
    arguments = parser.parse_args()
    pictures = load_pictures(arguments.data)
    pipe = PumaPipeline.from_pretrained(arguments.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    table, sheet = measure_reconstruction(pipe, pictures, arguments.count)
    results = {
        "reconstruction of unseen concepts (dB)": table,
        "exact answers, unseen pairs": measure_questions(pipe, pictures["heldout_pair"], arguments.count),
        "exact answers, unseen concepts": measure_questions(pipe, pictures["heldout_concept"], arguments.count),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=2))
    sheet.save(arguments.out / "reconstruction.png")
    text_to_image_sheet(pipe, pictures["heldout_pair"], SHOWN).save(arguments.out / "text_to_image.png")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
