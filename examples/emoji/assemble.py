"""Put the trained parts together: one model folder in half precision.

python examples/emoji/assemble.py --runs runs/emoji --out hub_configs/puma-emoji
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from train_decoder import noise_scheduler

from diffusers_puma import PumaPipeline, PumaUNet2DConditionModel
from transformers_puma import PumaForConditionalGeneration, PumaProcessor

NUM_INFERENCE_STEPS = 20
MAX_ANSWER_TOKENS = 64


def assemble(runs: Path, out: Path) -> None:
    """Keeps what else is in `out` (the model card, for one)."""
    half = {"dtype": torch.float16}
    decoders = {f"unet_{s}": PumaUNet2DConditionModel.from_pretrained(runs / f"unet_{s}", **half) for s in range(5)}
    pipeline = PumaPipeline(
        vae=AutoencoderKL.from_pretrained(runs / "vae", **half),
        scheduler=DDIMScheduler.from_config(noise_scheduler().config),
        mllm=PumaForConditionalGeneration.from_pretrained(runs / "mllm_tuned", **half),
        processor=PumaProcessor.from_pretrained(runs / "mllm_tuned"),
        default_num_inference_steps=NUM_INFERENCE_STEPS,
        **decoders,
    )
    # An answer is a few words; without a limit of its own the model gets the short one of transformers.
    pipeline.mllm.generation_config.max_new_tokens = MAX_ANSWER_TOKENS
    pipeline.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--out", type=Path, default=Path("runs/emoji/puma-emoji"))
    arguments = parser.parse_args()
    assemble(arguments.runs, arguments.out)


if __name__ == "__main__":
    main()
