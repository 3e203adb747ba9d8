"""Training of PUMA's language model. LoRA and the trainers on top of TRL need the extra `train`."""

from importlib import import_module

from .arguments import PumaTrainingArguments
from .callbacks import PumaSampleCallback, SampleCallback
from .checkpoints import ResumableTrainerMixin, last_whole_checkpoint
from .collator import PumaDataCollator, PumaPreferenceCollator
from .initialization import standardize_feature_heads, standardize_input
from .trainer import PumaTrainer

_NEEDS_EXTRA = {
    "PumaDPOConfig": "dpo_trainer",
    "PumaDPOTrainer": "dpo_trainer",
    "PumaSFTConfig": "sft_trainer",
    "PumaSFTTrainer": "sft_trainer",
    "puma_lora_config": "lora",
    "puma_token_ids": "lora",
}

__all__ = [
    "PumaDPOConfig",
    "PumaDPOTrainer",
    "PumaDataCollator",
    "PumaPreferenceCollator",
    "PumaSFTConfig",
    "PumaSFTTrainer",
    "PumaSampleCallback",
    "PumaTrainer",
    "PumaTrainingArguments",
    "ResumableTrainerMixin",
    "SampleCallback",
    "last_whole_checkpoint",
    "puma_lora_config",
    "puma_token_ids",
    "standardize_feature_heads",
    "standardize_input",
]


def __getattr__(name: str):
    if name not in _NEEDS_EXTRA:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f".{_NEEDS_EXTRA[name]}", __name__)
    except ModuleNotFoundError as error:
        if error.name not in ("trl", "peft", "datasets"):
            raise
        raise ImportError(f"{name} needs {error.name}: pip install 'puma-hub[train]'") from error
    return getattr(module, name)
