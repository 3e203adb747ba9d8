"""PUMA's language model for transformers: import this package and the Auto classes know `puma`."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_puma import PumaConfig
from .granularity import flatten_scales, multigranular_features, split_scales, tokens_per_scale
from .image_processing_puma import PumaImageProcessor
from .interleaved_puma import InterleavedOutput
from .modeling_puma import PumaForConditionalGeneration, PumaModel
from .processing_puma import PumaProcessor, add_puma_tokens

AutoConfig.register("puma", PumaConfig)
AutoModel.register(PumaConfig, PumaModel)
AutoModelForMultimodalLM.register(PumaConfig, PumaForConditionalGeneration)
AutoModelForImageTextToText.register(PumaConfig, PumaForConditionalGeneration)
# PIL is the only backend that reproduces the released preprocessing, whichever one is asked for.
AutoImageProcessor.register(
    PumaConfig, image_processor_classes={"pil": PumaImageProcessor, "torchvision": PumaImageProcessor}
)
AutoProcessor.register(PumaConfig, PumaProcessor)

# What is saved or pushed brings its code along, for `trust_remote_code=True` where this package is not installed.
PumaConfig.register_for_auto_class()
PumaModel.register_for_auto_class("AutoModel")
PumaForConditionalGeneration.register_for_auto_class("AutoModelForMultimodalLM")
PumaImageProcessor.register_for_auto_class("AutoImageProcessor")
PumaProcessor.register_for_auto_class("AutoProcessor")

__all__ = [
    "InterleavedOutput",
    "PumaConfig",
    "PumaForConditionalGeneration",
    "PumaImageProcessor",
    "PumaModel",
    "PumaProcessor",
    "add_puma_tokens",
    "flatten_scales",
    "multigranular_features",
    "split_scales",
    "tokens_per_scale",
]
