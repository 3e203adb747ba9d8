"""Tune the pretrained language model on all tasks at once (report section 3.4):

    python examples/emoji/tune_language_model.py --pretrained runs/emoji/mllm_copying --out runs/emoji/mllm_tuned

Also how a model is tuned to read some scales only (report table 5, compare_scales.py): `--input_scales 4 3`; and how
an adapter is tuned to some tasks (compare_adapters.py): `--lora_r 16 --shares 0 0 0 1 0 0 0 0 0`.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from emoji_tasks import KINDS, TaskMix
from emoji_training import parse_arguments
from peft import get_peft_model
from train_language_model import COMMON, DRAWING, CachedData, load_trained, train

from transformers_puma.training import PumaTrainingArguments, puma_lora_config

TUNING = COMMON | dict(own_feature_share=0.6)
PRESETS = {
    "cpu": dict(
        max_steps=800,
        per_device_train_batch_size=32,
        learning_rate=8e-4,
        warmup_steps=50,
        save_steps=100,
        **TUNING,
    ),
    "gpu": dict(
        max_steps=10000,
        per_device_train_batch_size=256,
        learning_rate=3e-4,
        warmup_steps=500,
        save_steps=1000,
        **TUNING,
    ),
}
FINEST_SCALE = (0.10, 0.30, 0.60, 0.0, 0.0)  # objects of scenes take the finer scales
SCENE_SHARE = 0.6
SHARES = (0.30, 0.02, 0.10, 0.18, 0.10, 0.03, 0.11, 0.11, 0.05)


@dataclass
class TuningArguments(CachedData):
    pretrained: str = field(default="runs/emoji/mllm_copying", metadata={"help": "the model to start from"})
    input_scales: list[int] | None = field(default=None, metadata={"help": "scales to read of a picture (all)"})
    shares: list[float] = field(
        default_factory=lambda: list(SHARES), metadata={"help": f"of the tasks: {', '.join(KINDS)}"}
    )
    held_out: str = field(default="heldout_pair", metadata={"help": "split that is evaluated"})
    lora_r: int | None = field(default=None, metadata={"help": "train and save a LoRA adapter of this rank alone"})


def main() -> None:
    stage, arguments, options = parse_arguments(
        "mllm_tuned", PRESETS, extra=TuningArguments, training_arguments=PumaTrainingArguments
    )
    if Path(stage.out).exists():
        return
    # Other rows than in pretraining.
    arguments.seed += 1
    torch.manual_seed(arguments.seed)
    model, processor = load_trained(options.pretrained, input_scales=options.input_scales)
    mix = TaskMix(tuple(options.shares), FINEST_SCALE, scenes=SCENE_SHARE)
    if options.lora_r is None:
        train(model, processor, stage, arguments, options, mix, held_out=options.held_out)
        return
    adapter = puma_lora_config(model, token_ids=[], r=options.lora_r, lora_alpha=2 * options.lora_r)
    adapted = get_peft_model(model, adapter)
    evaluated = replace(DRAWING, kinds=mix.kinds)
    train(adapted, processor, stage, arguments, options, mix, evaluated, options.held_out)


if __name__ == "__main__":
    main()
