"""Training of decoders: one at a time, each for one scale (report sections 3.2 and A.1)."""

from .arguments import PumaDecoderTrainingArguments
from .callbacks import PumaDecoderSampleCallback
from .decoder_trainer import PumaDecoderTrainer
from .denoising_loss import Draws, denoising_loss, denoising_target, draw, sample_noise
from .features import feature_statistics, pool_to_tokens, standardize_projection
from .pictures import PumaDecoderCollator

__all__ = [
    "Draws",
    "PumaDecoderCollator",
    "PumaDecoderSampleCallback",
    "PumaDecoderTrainer",
    "PumaDecoderTrainingArguments",
    "denoising_loss",
    "denoising_target",
    "draw",
    "feature_statistics",
    "pool_to_tokens",
    "sample_noise",
    "standardize_projection",
]
