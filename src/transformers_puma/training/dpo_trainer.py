"""`trl.DPOTrainer` for PUMA: preferences over answers in text."""

import copy
from dataclasses import dataclass, field

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOConfig, DPOTrainer

from .arguments import ProjectorArguments, adopt_arguments
from .collator import PumaPreferenceCollator
from .trl_common import RowsMixin, check_supported, load_model_and_processor

SUPPORTED = {
    "padding_free": (False,),
    "truncation_mode": ("keep_start",),
    "pad_to_multiple_of": (None,),
    "pad_token": (None,),
    "precompute_ref_log_probs": (False,),
    "precompute_ref_batch_size": (None,),
    "dataset_num_proc": (None,),
    "label_smoothing_factor": (0.0,),  # that of preferences is `label_smoothing`
    "trust_remote_code": (False,),
    "router_aux_loss_coef": (None, 0.0),
}


@dataclass
class PumaDPOConfig(ProjectorArguments, DPOConfig):
    """`trl.DPOConfig` with a learning rate for the projector.

    Raises:
        ValueError: an argument of TRL that would do nothing here.
    """

    max_length: int | None = field(
        default=None, metadata={"help": "Longer prompts with answers are cut; None keeps them whole."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_supported(self, SUPPORTED)


class PumaDPOTrainer(RowsMixin, DPOTrainer):
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290) of PUMA's answers.

    Takes the arguments of `trl.DPOTrainer`; `args` is a `PumaDPOConfig` or a stock one. Data sets hold the rows of
    `PumaPreferenceCollator`. Only text is preferred, so the image head has no part and is frozen.

    Without `ref_model` the reference is the model as given: a copy, or with `peft_config` the model without its
    adapter; of a `PeftModel` TRL copies the adapter.
    """

    args: PumaDPOConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: PumaDPOConfig | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        peft_config=None,
        **kwargs,
    ):
        args = copy.copy(adopt_arguments(PumaDPOConfig, args))
        model, processing_class = load_model_and_processor(
            model, processing_class, args.model_init_kwargs, kwargs.pop("quantization_config", None)
        )
        args.model_init_kwargs = None
        if ref_model is None and peft_config is None and not isinstance(model, PeftModel):
            if is_deepspeed_zero3_enabled():
                raise ValueError("a model sharded by ZeRO-3 cannot be copied: give ref_model, or train with PEFT")
            ref_model = copy.deepcopy(model)
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator
            or PumaPreferenceCollator(processing_class, model.config.tokens_per_scale, args.max_length),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        if not isinstance(self.accelerator.unwrap_model(self.model).get_output_embeddings(), nn.Linear):
            raise ValueError(
                "TRL scores preferences by the weight of the text head alone, without rows that an adapter trains: "
                "merge that adapter into the model, or make one with puma_lora_config(model, token_ids=[])"
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # TRL keeps the labels to itself, by which the model knows that it is trained.
        inputs = {**inputs, "run_image_modules": True}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _freeze(self) -> None:
        super()._freeze()
        self.accelerator.unwrap_model(self.model).image_head.requires_grad_(False)
