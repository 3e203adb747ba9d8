"""`trl.SFTTrainer` for PUMA, with the model's own loss: text and images."""

import copy
from dataclasses import dataclass, field

from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from .arguments import ModelLossArguments, adopt_arguments
from .collator import PumaDataCollator
from .language_model_trainer import ModelLossMixin
from .trl_common import RowsMixin, check_supported, load_model_and_processor

SUPPORTED = {
    "loss_type": ("nll",),
    "completion_only_loss": (None, True),
    "padding_free": (False,),
    "packing_strategy": ("bfd",),
    "eval_packing": (None,),
    "truncation_mode": ("keep_start",),
    "pad_to_multiple_of": (None,),
    "pad_token": (None,),
    "dataset_text_field": ("text", ""),
    "shuffle_dataset": (False,),
    "dataset_kwargs": (None, {"skip_prepare_dataset": True}),  # which is how rows are read in any case
    "dataset_num_proc": (None,),
    "trust_remote_code": (False,),
    "router_aux_loss_coef": (None, 0.0),
}


@dataclass
class PumaSFTConfig(ModelLossArguments, SFTConfig):
    """`trl.SFTConfig` with the arguments of `PumaTrainingArguments`.

    `assistant_only_loss` is on by default and concerns conversations `messages`; of a prompt and its completion, only
    the completion is supervised in any case. `packing` joins the rows of a batch.

    Raises:
        ValueError: an argument of TRL that would do nothing here.
    """

    assistant_only_loss: bool = field(
        default=True, metadata={"help": "Supervise only what the assistant says and draws in a conversation."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_supported(self, SUPPORTED)


class PumaSFTTrainer(RowsMixin, ModelLossMixin, SFTTrainer):
    """Supervised tuning of `PumaForConditionalGeneration` on texts and images, whole or with `peft_config`.

    Takes the arguments of `trl.SFTTrainer`; `args` is a `PumaSFTConfig` or a stock one. Data sets hold the rows of
    `PumaDataCollator`, of any kind. The stock class scores text alone and would leave the image head without gradient;
    this one minimises the loss of the model, as `PumaTrainer` does.
    """

    args: PumaSFTConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: PumaSFTConfig | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        **kwargs,
    ):
        args = copy.copy(adopt_arguments(PumaSFTConfig, args))
        if kwargs.get("formatting_func") is not None:
            raise ValueError("formatting_func is not supported: map the data set to rows of PumaDataCollator")
        model, processing_class = load_model_and_processor(
            model, processing_class, args.model_init_kwargs, kwargs.pop("quantization_config", None)
        )
        args.model_init_kwargs = None
        if data_collator is None:
            data_collator = PumaDataCollator(
                processing_class,
                model.config.tokens_per_scale,
                args.max_length,
                args.packing,
                args.assistant_only_loss,
            )
        # These two are the collator's. TRL refuses the first for pictures, and the second where the first row is no
        # conversation.
        asked = args.packing, args.assistant_only_loss
        args.packing, args.assistant_only_loss = False, False
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.args.packing, self.args.assistant_only_loss = asked
