"""Tune the pretrained language model on all tasks at once (report section 3.4):

    python examples/emoji/tune_language_model.py --pretrained runs/emoji/mllm --out runs/emoji/mllm_tuned

Also how a model is tuned to read some scales only (report table 5): `--input_scales 4 3`.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from emoji_tasks import TaskMix
from emoji_training import parse_arguments
from train_language_model import COMMON, CachedData, train

from transformers_puma import PumaForConditionalGeneration, PumaProcessor
from transformers_puma.training import PumaTrainingArguments

PRESETS = {
    "cpu": dict(
        max_steps=350, per_device_train_batch_size=32, learning_rate=4e-4, warmup_steps=20, save_steps=50, **COMMON
    ),
    "gpu": dict(
        max_steps=10000,
        per_device_train_batch_size=256,
        learning_rate=3e-4,
        warmup_steps=500,
        save_steps=1000,
        **COMMON,
    ),
}
MIX = TaskMix(kinds=(0.25, 0.05, 0.45, 0.15, 0.10))


@dataclass
class TuningArguments(CachedData):
    pretrained: str = field(default="runs/emoji/mllm", metadata={"help": "the model to start from"})
    input_scales: list[int] | None = field(default=None, metadata={"help": "scales to read of a picture (all)"})


def main() -> None:
    stage, arguments, options = parse_arguments(
        "mllm_tuned", PRESETS, extra=TuningArguments, training_arguments=PumaTrainingArguments
    )
    if Path(stage.out).exists():
        return
    # Other rows than in pretraining.
    arguments.seed += 1
    torch.manual_seed(arguments.seed)
    model = PumaForConditionalGeneration.from_pretrained(options.pretrained, input_scales=options.input_scales)
    processor = PumaProcessor.from_pretrained(options.pretrained)
    train(model, processor, stage, arguments, options, MIX)


if __name__ == "__main__":
    main()
