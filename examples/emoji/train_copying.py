"""Teach the pretrained language model to copy from the picture that it reads, before it learns to edit:

    python examples/emoji/train_copying.py --pretrained runs/emoji/mllm --out runs/emoji/mllm_copying

What it learns is the attention that finds a position of the picture that is read, of which edits alone learn little.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from emoji_tasks import TaskMix, alone
from emoji_training import parse_arguments
from train_language_model import COMMON, CachedData, load_trained, train

from transformers_puma.training import PumaTrainingArguments

PRESETS = {
    "cpu": dict(
        max_steps=400, per_device_train_batch_size=16, learning_rate=1e-3, warmup_steps=50, save_steps=100, **COMMON
    ),
    "gpu": dict(
        max_steps=1000, per_device_train_batch_size=128, learning_rate=1e-3, warmup_steps=100, save_steps=500, **COMMON
    ),
}
COPYING = TaskMix(alone("copy"))


@dataclass
class CopyingArguments(CachedData):
    pretrained: str = field(default="runs/emoji/mllm", metadata={"help": "the model to start from"})


def main() -> None:
    stage, arguments, options = parse_arguments(
        "mllm_copying", PRESETS, extra=CopyingArguments, training_arguments=PumaTrainingArguments
    )
    if Path(stage.out).exists():
        return
    arguments.seed += 2  # other rows than in the stages before and after
    torch.manual_seed(arguments.seed)
    train(*load_trained(options.pretrained), stage, arguments, options, COPYING)


if __name__ == "__main__":
    main()
