"""PUMA's decoders and pipeline for diffusers: import this package and `DiffusionPipeline` loads `PumaPipeline`."""

from importlib import import_module

from .conversion import convert_released_decoders
from .loading import register_pipeline
from .pipeline_output import PumaPipelineOutput
from .pipeline_puma import PumaPipeline
from .unet_puma import PumaUNet2DConditionModel

register_pipeline(PumaPipeline)

__all__ = [
    "PumaDecoderTrainer",
    "PumaPipeline",
    "PumaPipelineOutput",
    "PumaUNet2DConditionModel",
    "convert_released_decoders",
]


def __getattr__(name: str):
    # Only those who train wait for the import of a Trainer.
    if name != "PumaDecoderTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(".training", __name__).PumaDecoderTrainer
