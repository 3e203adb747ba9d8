"""Take the encoder and the VAE out of a trained model folder, so that `train.py --pretrained` goes on from them:

python examples/emoji/take_parts.py --model hub_configs/puma-emoji --runs runs/emoji
"""

import argparse
import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from transformers_puma import PumaForConditionalGeneration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the trained model folder")
    parser.add_argument("--runs", type=Path, default=Path("runs/emoji"))
    arguments = parser.parse_args()
    mllm = PumaForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32)
    parts = {
        "encoder": mllm.model.vision_tower,
        "vae": AutoencoderKL.from_pretrained(arguments.model / "vae", torch_dtype=torch.float32),
    }
    for name, part in parts.items():
        out = arguments.runs / name
        if out.exists():
            continue
        partial = out.with_name(f"{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        part.save_pretrained(partial)
        os.replace(partial, out)


if __name__ == "__main__":
    main()
