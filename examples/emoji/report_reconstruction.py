"""The report's table 1 in small: pictures of concepts that no training saw, encoded and decoded at five scales."""

import torch
from measuring import Bench, averages, decode, distances, generators, is_drawn, numbered, per_sample, spread, to_pil
from train_vae import round_trip

PART = "reconstruction"
SEEDS = (0, 1)
NEAREST, VAE = "nearest training picture", "VAE round trip"


def nearest(pixels: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """For each picture (B, 3, H, W) in [0, 1] the candidate (uint8) of least squared error."""
    best, error = torch.zeros(len(pixels), dtype=torch.long), torch.full((len(pixels),), torch.inf)
    flat = pixels.flatten(1)
    for start in range(0, len(candidates), 2048):
        part = candidates[start : start + 2048].flatten(1).float() / 255
        values, rows = torch.cdist(flat, part).min(1)
        best, error = torch.where(values < error, rows + start, best), torch.minimum(values, error)
    return candidates[best].float() / 255


def measure(bench: Bench, samples: list[dict]) -> list[dict]:
    """PSNR and LPIPS against the original (_r) and, for decoders, against another seed (_d)."""
    truth = bench.pictures["heldout_concept"][torch.tensor([sample["row"] for sample in samples])]
    mask, features = is_drawn(truth), bench.pipe.encode_image(to_pil(truth))
    shown = {VAE: round_trip(bench.pipe.vae, truth)}
    if "train" in bench.pictures:
        shown[NEAREST] = nearest(truth, bench.pictures["train"].pixels)
    first, second = (decode(bench.pipe, features, bench.pipe.scales, generators(samples, seed)) for seed in SEEDS)
    shown |= {f"scale {scale}": pictures for scale, pictures in first.items()}
    table = {label: distances(bench, pictures, truth, mask, "r") for label, pictures in shown.items()}
    for scale in first:
        table[f"scale {scale}"] |= distances(bench, first[scale], second[scale], mask, "d")
    for i, sample in enumerate(samples):
        bench.keep(PART, sample, original=truth[i], **{label: pictures[i] for label, pictures in shown.items()})
    return per_sample(table)


def run(bench: Bench, count: int) -> dict:
    samples = numbered([{"row": row} for row in spread(bench.pictures["heldout_concept"], count)])
    rows = bench.run(PART, samples, lambda batch: measure(bench, batch))
    return {"samples": len(rows), "table": averages(rows)}


def sheet(bench: Bench, result: dict):
    labels = {"original": "original"} | {label: label for label in result["table"]}
    return bench.sheet(PART, labels, None, result["samples"])
