"""`transformers.Trainer` with the loss of PUMA: two global counts, two learning rates, losses logged by part."""

from transformers import Trainer

from ..processing_puma import PumaProcessor
from .arguments import PumaTrainingArguments, adopt_arguments
from .collator import PumaDataCollator
from .language_model_trainer import ModelLossMixin


class PumaTrainer(ModelLossMixin, Trainer):
    """Trains `PumaForConditionalGeneration`, whole or through PEFT; the encoder is frozen (report section 3.2).

    Takes the arguments of `transformers.Trainer`; `args` is a `PumaTrainingArguments` or a stock one, and
    `processing_class` the model's `PumaProcessor`, from which the default `data_collator` is made. See
    `ModelLossMixin` for the loss and the logs.
    """

    args: PumaTrainingArguments

    def __init__(self, model=None, args: PumaTrainingArguments | None = None, data_collator=None, **kwargs):
        args = adopt_arguments(PumaTrainingArguments, args)
        if data_collator is None and not isinstance(processor := kwargs.get("processing_class"), PumaProcessor):
            raise ValueError(
                "processing_class (the model's PumaProcessor) or a data_collator is needed, got a processing_class of "
                f"type {type(processor).__name__}"
            )
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)
        if data_collator is None:
            self.data_collator = PumaDataCollator(
                self.processing_class, self.model.config.tokens_per_scale, args.max_length, args.packing
            )
