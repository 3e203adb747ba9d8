"""`transformers.Trainer` with the loss of PUMA: two global counts, two learning rates, losses logged by part."""

import torch
from transformers import Trainer

from ..modeling_puma import ImagePositions, PumaModel
from .arguments import PumaTrainingArguments
from .collator import PumaDataCollator


class PumaTrainer(Trainer):
    """Trains `PumaForConditionalGeneration`, whole or through PEFT; the encoder is frozen (report section 3.2).

    Takes the arguments of `transformers.Trainer`; `args` is a `PumaTrainingArguments` and `processing_class` the
    model's `PumaProcessor`, from which the default `data_collator` is made.

    Text and image losses are means over the supervised tokens of the global batch, counted separately, so gradient
    accumulation and data parallelism change nothing but rounding.
    """

    args: PumaTrainingArguments

    def __init__(self, model=None, args: PumaTrainingArguments | None = None, data_collator=None, **kwargs):
        if args is None:
            args = PumaTrainingArguments("trainer_output")
        if not isinstance(args, PumaTrainingArguments):
            raise ValueError(f"args must be a PumaTrainingArguments, got a {type(args).__name__}")
        if data_collator is None:
            if kwargs.get("processing_class") is None:
                raise ValueError("processing_class (the model's PumaProcessor) or a data_collator is needed")
            data_collator = PumaDataCollator(kwargs["processing_class"], model.config.tokens_per_scale)
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)
        for module in self.model.modules():
            if isinstance(module, PumaModel):
                module.vision_tower.requires_grad_(False)
        # The two counts make the loss of each micro-batch its share of the global batch: nothing more to divide by.
        self.model_accepts_loss_kwargs = True
        self._logged_parts: list[torch.Tensor] = []

    def create_optimizer(self, model=None):
        """Stock groups (with and without weight decay), each split in two where the projector has its own rate."""
        optimizer = super().create_optimizer(model)
        if self.args.projector_learning_rate is not None:
            names = {id(parameter): name for name, parameter in (model or self.model).named_parameters()}
            for group in list(optimizer.param_groups):
                is_head = [_is_projection(names[id(parameter)]) for parameter in group["params"]]
                heads = [p for p, flag in zip(group["params"], is_head, strict=True) if flag]
                group["params"] = [p for p, flag in zip(group["params"], is_head, strict=True) if not flag]
                options = {key: value for key, value in group.items() if key != "params"}
                optimizer.add_param_group({**options, "params": heads, "lr": self.args.projector_learning_rate})
        return optimizer

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> torch.Tensor:
        """(2,) supervised text and image tokens in all micro-batches of all processes."""
        image_token_id = self.accelerator.unwrap_model(self.model).config.image_token_id
        counts = torch.zeros(2, dtype=torch.long, device=device)
        for batch in batch_samples:
            counts[0] += (batch["labels"][:, 1:] != -100).sum().to(device)
            if "image_loss_mask" in batch:
                positions = ImagePositions.find(batch["input_ids"], image_token_id)
                supervised = positions.mask & batch["image_loss_mask"][positions.image.clamp(min=0)]
                counts[1] += supervised.sum().to(device)
        return self.accelerator.reduce(counts, reduction="sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        counts = {}
        if num_items_in_batch is not None:
            counts = {"num_text_items": num_items_in_batch[0], "num_image_items": num_items_in_batch[1]}
        noise = self.args.feature_noise if model.training else 0.0
        outputs = model(**inputs, **counts, feature_noise=noise)
        # Data parallelism averages gradients over processes; the shares of the global batch are to be summed.
        loss = outputs.loss * (self.accelerator.num_processes if counts else 1)
        if model.training:
            share = self.current_gradient_accumulation_steps * self.accelerator.num_processes if counts else 1
            parts = torch.stack([outputs.text_loss * share, outputs.image_loss * share])
            self._logged_parts.append(torch.cat([parts.detach().float(), outputs.scale_losses]))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None):
        """Adds the two parts of the loss and the unweighted squared error per scale, averaged since the last time."""
        if "loss" in logs and self._logged_parts:
            text, image, *scales = torch.stack(self._logged_parts).nanmean(0).tolist()
            logs |= {"text_loss": text, "image_loss": image}
            logs |= {f"mse_scale_{scale}": error for scale, error in enumerate(scales) if error == error}
            self._logged_parts.clear()
        super().log(logs, start_time)


def _is_projection(name: str) -> bool:
    return "projector." in name or "image_head." in name
