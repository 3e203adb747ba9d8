"""Control against diversity, of the scales and of schedules between them:

    python examples/control_and_diversity.py --model hub_configs/puma-emoji --data PICTURES --out control_and_diversity

Each picture is encoded and decoded with two seeds. Control is PSNR to the original, diversity is LPIPS between the
seeds. A schedule lays out the first part of the denoising with a coarse decoder and finishes with the finest. Writes
`OUT.json` and `OUT.png`; killed and started again, it goes on after the last point that was measured.
"""

import argparse
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from diffusers_puma import PumaPipeline
from diffusers_puma.evaluation import load_lpips, lpips_distance, open_pictures
from diffusers_puma.evaluation.pictures import as_square, psnr, to_tensor
from puma_files import whole_file
from transformers_puma.evaluation.runner import model_settings, sample_seed

PARTS = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
SEEDS = (0, 1)


def points(pipe: PumaPipeline) -> dict[str, int | list[tuple[float, int]]]:
    """Name -> `scale` of the pipeline: every scale, and schedules from each to the finest."""
    finest, *coarser = pipe.scales
    schedules = {f"{scale}:{part},{finest}": [(part, scale), (1.0, finest)] for scale in coarser for part in PARTS}
    return {**{str(scale): scale for scale in pipe.scales}, **schedules}


@torch.no_grad()
def measure(pipe: PumaPipeline, pictures: list, scale: int | list, lpips: torch.nn.Module, steps: int) -> dict:
    """PSNR to the originals and LPIPS between two seeds, each the mean over pictures."""
    drawn = []
    for seed in SEEDS:
        generators = [torch.Generator().manual_seed(sample_seed(seed, i)) for i in range(len(pictures))]
        drawn.append(
            [
                picture
                for start in range(0, len(pictures), 16)
                for picture in pipe(
                    image=pictures[start : start + 16],
                    scale=scale,
                    generator=generators[start : start + 16],
                    num_inference_steps=steps,
                ).images
            ]
        )
    first, second = (to_tensor([as_square(p, pictures[0].width) for p in images]) for images in drawn)
    originals = to_tensor(pictures)
    control = torch.cat([psnr(first, originals), psnr(second, originals)]).mean()
    return {"psnr_r": control.item(), "lpips_d": lpips_distance(lpips, first, second).mean().item()}


def draw(results: dict[str, dict], output: Path) -> None:
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="diversity: LPIPS between seeds", ylabel="control: PSNR to the original (dB)")
    finest = next(iter(results))
    scales = [name for name in results if "," not in name]
    for start in scales[1:]:
        names = [finest, *(name for name in results if name.startswith(f"{start}:")), start]
        x, y = ([results[name][metric] for name in names] for metric in ("lpips_d", "psnr_r"))
        axes.plot(x, y, ".-", linewidth=0.8, label=f"scale {start}, then {finest}")
    x, y = ([results[name][metric] for name in scales] for metric in ("lpips_d", "psnr_r"))
    axes.plot(x, y, "ko--", linewidth=0.8, label="one scale")
    for name, point in zip(scales, zip(x, y, strict=True), strict=True):
        axes.annotate(f"$f_{name}$", point, xytext=(5, 5), textcoords="offset points")
    axes.legend()
    with whole_file(output) as unfinished:
        figure.savefig(unfinished, format="png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="hub_configs/puma-emoji")
    parser.add_argument("--data", required=True, help="a folder of pictures, parquet files or a saved data set")
    parser.add_argument("--split", help="of a data set with several")
    parser.add_argument("--out", type=Path, default=Path("control_and_diversity"), help="without a suffix")
    parser.add_argument("--count", type=int, default=64, help="pictures")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
    parser.add_argument("--lpips-weights", help="see `puma eval reconstruction --help`")
    arguments = parser.parse_args()
    samples = open_pictures(arguments.data, arguments.split).first(arguments.count)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = PumaPipeline.from_pretrained(arguments.model, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    size = getattr(pipe, f"unet_{min(pipe.scales)}").config.sample_size * pipe.vae_scale_factor
    pictures = [as_square(sample["image"], size) for sample in samples]
    lpips = load_lpips(arguments.lpips_weights).to(device)
    steps = arguments.steps or pipe.config.default_num_inference_steps

    file = Path(f"{arguments.out}.json")
    settings = {**model_settings(arguments.model), "pictures": samples.source, "count": len(samples), "steps": steps}
    results = {}
    if file.exists() and (saved := json.loads(file.read_text()))["settings"] == settings:
        results = saved["results"]
    for name, scale in tqdm(points(pipe).items(), desc="control and diversity"):
        if name in results:
            continue
        results[name] = measure(pipe, pictures, scale, lpips, steps)
        with whole_file(file) as unfinished:
            unfinished.write_text(json.dumps({"settings": settings, "results": results}, indent=1))
    draw({name: results[name] for name in points(pipe)}, Path(f"{arguments.out}.png"))
    for name in points(pipe):
        print(f"{name:8} PSNR_r {results[name]['psnr_r']:6.2f} dB  LPIPS_d {results[name]['lpips_d']:.4f}")


if __name__ == "__main__":
    main()
