"""PUMA's decoders and pipeline for diffusers: import this package and `DiffusionPipeline` loads `PumaPipeline`."""

from .conversion import convert_released_decoders
from .loading import register_pipeline
from .pipeline_output import PumaPipelineOutput
from .pipeline_puma import PumaPipeline
from .unet_puma import PumaUNet2DConditionModel

register_pipeline(PumaPipeline)

__all__ = ["PumaPipeline", "PumaPipelineOutput", "PumaUNet2DConditionModel", "convert_released_decoders"]
