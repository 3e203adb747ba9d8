"""Training of decoders: one at a time, each for one scale (report sections 3.2 and 4.1)."""

from .arguments import PumaDecoderTrainingArguments
from .decoder_trainer import PumaDecoderTrainer
from .denoising_loss import denoising_loss, denoising_target, sample_noise
from .features import feature_statistics, pool_to_tokens, standardize_projection

__all__ = [
    "PumaDecoderTrainer",
    "PumaDecoderTrainingArguments",
    "denoising_loss",
    "denoising_target",
    "feature_statistics",
    "pool_to_tokens",
    "sample_noise",
    "standardize_projection",
]
