"""What PUMA's trainers on top of TRL share: how they take data sets, arguments, a model and its processor."""

import torch
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..modeling_puma import PumaForConditionalGeneration
from .language_model_trainer import PumaTrainerMixin


class RowsMixin(PumaTrainerMixin):
    """Leaves data sets as they are: TRL would tokenise those without pictures, in another form."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


def check_supported(args, supported: dict[str, tuple]):
    """Refuses arguments of TRL that would do nothing here; `supported` holds the values that are allowed of each."""
    for name, values in supported.items():
        if getattr(args, name) not in values:
            raise ValueError(
                f"{type(args).__name__} does not support {name}={getattr(args, name)!r}: expected "
                f"{' or '.join(map(repr, values))}"
            )


def load_model_and_processor(
    model: str | PreTrainedModel,
    processor: ProcessorMixin | None,
    model_init_kwargs: dict | None,
    quantization_config: QuantizationConfigMixin | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model given as a folder or Hub id is loaded, in float32 unless `model_init_kwargs` says otherwise. If no
    processor is given, it is loaded from where the model is from.

    Raises:
        ValueError: no processor; `model_init_kwargs` or a `quantization_config` for a model that is loaded already.
    """
    settings = dict(model_init_kwargs or {})
    if quantization_config is not None:
        settings["quantization_config"] = quantization_config
    source = model if isinstance(model, str) else model.config.name_or_path
    if processor is None and source:
        processor = AutoProcessor.from_pretrained(source)
    if isinstance(model, str):
        model = PumaForConditionalGeneration.from_pretrained(model, **{"dtype": torch.float32, **settings})
    elif settings:
        raise ValueError(f"model_init_kwargs={settings} has no part in a model that is given: set it there")
    if processor is None:
        raise ValueError("processing_class (the model's PumaProcessor) is needed")
    return model, processor
