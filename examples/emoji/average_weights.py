"""Average the weights of language models of which each was trained on from the one before:

    python examples/emoji/average_weights.py --models runs/emoji/mllm_tenth runs/emoji/mllm_eleventh \
        --out runs/emoji/mllm_averaged
"""

import argparse
import os
import shutil
from pathlib import Path

import torch
from train_language_model import load_trained

from transformers_puma import PumaForConditionalGeneration


@torch.no_grad()
def average(models: list[PumaForConditionalGeneration]) -> PumaForConditionalGeneration:
    """The first of them, with the mean of all weights.

    Raises:
        ValueError: weights of other names or shapes.
    """
    mean, *others = models
    shapes = {name: weight.shape for name, weight in mean.named_parameters()}
    for number, other in enumerate(others, start=2):
        found = {name: weight.shape for name, weight in other.named_parameters()}
        differing = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        if differing:
            name = differing[0]
            raise ValueError(f"model {number} has {name} as {found.get(name)}, the first as {shapes.get(name)}")
        for weight, added in zip(mean.parameters(), other.parameters(), strict=True):
            weight.lerp_(added, 1 / number)
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True, help="folders of models in single precision")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    if Path(arguments.out).exists():
        return
    loaded = [load_trained(folder) for folder in arguments.models]
    processor = loaded[0][1]
    partial = f"{arguments.out}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    average([model for model, _ in loaded]).save_pretrained(partial)
    processor.save_pretrained(partial)
    os.replace(partial, arguments.out)


if __name__ == "__main__":
    main()
