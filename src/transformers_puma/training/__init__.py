"""Training of PUMA's language model."""

from .arguments import PumaTrainingArguments
from .collator import PumaDataCollator
from .initialization import standardize_feature_heads
from .trainer import PumaTrainer

__all__ = ["PumaDataCollator", "PumaTrainer", "PumaTrainingArguments", "standardize_feature_heads"]
