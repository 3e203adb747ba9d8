"""What trainers of the language model share, on top of `transformers.Trainer` and of its subclasses in TRL: groups of
the optimizer, and a loss that is exact over the global batch."""

import math
import random

import torch

from ..backbone_checks import require_blocks, require_separate_rows
from ..image_positions_puma import ImagePositions
from ..loss_puma import is_supervised_text
from ..modeling_puma import PumaModel
from .checkpoints import ResumableTrainerMixin
from .loss_parts import LossParts


class PumaTrainerMixin(ResumableTrainerMixin):
    """A frozen encoder, and a learning rate of their own for the projector and the image head."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.optimizer is not None and self.args.projector_learning_rate is not None:
            raise ValueError(
                f"projector_learning_rate={self.args.projector_learning_rate} has no part in an optimizer that is "
                "given: set the rates of its groups"
            )
        self._freeze()

    def _puma_model(self) -> PumaModel:
        for module in self.model.modules():
            if isinstance(module, PumaModel):
                return module
        raise ValueError(f"model must be a PumaForConditionalGeneration, got a {type(self.model).__name__}")

    def _freeze(self) -> None:
        """What is not trained: here the encoder."""
        self._puma_model().vision_tower.requires_grad_(False)

    def create_optimizer(self, model=None):
        """Stock groups (with and without weight decay), each split in two where the projector has its own rate."""
        if self.optimizer is not None:  # the caller's, or that of an earlier `train()`, whose groups are split
            return self.optimizer
        self._freeze()  # the model may be a new one, of `model_init`
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


class ModelLossMixin(PumaTrainerMixin):
    """The model's own loss, exact over the global batch, and its parts in the logs.

    Text and image losses are means over the supervised tokens of the global batch, counted separately, so gradient
    accumulation and data parallelism change nothing but rounding (and random draws, if there is `feature_noise` or a
    flow head: the random state of a process is its own, and `transformers` seeds all alike). Only the last batch of an
    epoch, where rows are too few for all processes, is filled up with rows from the start, as accelerate does.

    Logged, over steps with own features and without, beside `loss` are `text_loss` and `image_loss`, and
    `mse_scale_i`, the unweighted squared error over all supervised tokens of scale i since the last time. Evaluations
    give the same with the prefix of the metrics, all of them, and `loss`, over the supervised tokens of the whole data
    set, from true features. (Of a stream that several processes evaluate through workers of a data loader, rows that
    fill up the last batch count again.)
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise ValueError("the loss is the model's own: label_smoothing_factor and compute_loss_func have no part")
        lengths = self.args.length_column_name
        if self.args.train_sampling_strategy == "group_by_length" and lengths not in (
            getattr(self.train_dataset, "column_names", None) or []
        ):
            raise ValueError(
                "train_sampling_strategy='group_by_length' needs the lengths of rows, which the collator alone knows: "
                f"expected a column {lengths!r} in train_dataset (length_column_name)"
            )
        # The two counts make the loss of each micro-batch its share of the global batch: nothing more to divide by.
        self.model_accepts_loss_kwargs = True
        config = self._puma_model().config
        share, ways = self.args.own_feature_share, (config.image_decoding, config.image_head)
        if not 0 <= share <= 1:
            raise ValueError(f"own_feature_share={share} must be from 0 to 1")
        if share and ways != ("next_scale", "regression"):
            raise ValueError(
                f"own_feature_share={share} is for image_decoding='next_scale' with image_head='regression', but the "
                f"model has {ways[0]!r} with {ways[1]!r}: expected 0"
            )
        if not 0 <= self.args.feature_noise < math.inf:
            raise ValueError(f"feature_noise={self.args.feature_noise} must be a finite number from 0")
        self._train_parts, self._eval_parts = LossParts(config.num_scales), LossParts(config.num_scales)
        self._is_backbone_checked = False

    def _check_backbone(self) -> None:
        self._is_backbone_checked = True
        if self.place_model_on_device:  # else the weights are sharded, or not here yet
            model = self._puma_model()
            is_training = model.training
            model.eval()
            with self.accelerator.autocast():  # in the number format of the training
                if self.args.packing:
                    require_separate_rows(model.language_model)
                if model.config.image_decoding == "next_scale":
                    require_blocks(model)
            model.train(is_training)

    def train(self, *args, **kwargs):
        self._check_backbone()
        self._train_parts.clear()
        return super().train(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> torch.Tensor:
        """(2,) supervised text and image tokens in all micro-batches of all processes."""
        image_token_id = self.accelerator.unwrap_model(self.model).config.image_token_id
        counts = torch.zeros(2, dtype=torch.long, device=device)
        for batch in batch_samples:
            counts[0] += is_supervised_text(batch["labels"], image_token_id).sum().to(device)
            counts[1] += self._supervised_per_scale(batch).sum().to(device)
        return self.accelerator.reduce(counts, reduction="sum")

    def _supervised_per_scale(self, batch: dict) -> torch.Tensor:
        """(num_scales,) supervised image tokens of each scale."""
        config = self.accelerator.unwrap_model(self.model).config
        positions = ImagePositions.find(batch["input_ids"], config.image_token_id)
        supervised = positions.of_images(batch.get("image_loss_mask"))
        return torch.bincount(positions.scales(config.tokens_per_scale)[supervised], minlength=config.num_scales)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        counts = {}
        if num_items_in_batch is not None:
            counts = {"num_text_items": num_items_in_batch[0], "num_image_items": num_items_in_batch[1]}
        noise = self.args.feature_noise if model.training else 0.0
        inputs = {"skip_logits": not return_outputs, **inputs}
        num_tokens = self._supervised_per_scale(inputs)
        if model.training and self._reads_own_features():
            inputs["read_features"] = self._own_features(model, inputs, num_tokens)
        outputs = model(**inputs, **counts, feature_noise=noise, use_cache=False)

        losses = torch.stack([outputs.text_loss, outputs.image_loss]).detach().float()
        if model.training:  # means over steps, as `loss` is logged
            weights = torch.ones_like(losses)
            if counts:  # a share of a step, and the losses of such
                losses = losses * self.accelerator.num_processes
                weights = weights / self.current_gradient_accumulation_steps
        else:
            image_token_id = self.accelerator.unwrap_model(model).config.image_token_id
            num_text = is_supervised_text(inputs["labels"], image_token_id).sum()
            weights = torch.stack([num_text, num_tokens.sum()])
            losses = losses * (num_items_in_batch if counts else weights)
        errors = torch.where(num_tokens > 0, outputs.scale_losses * num_tokens, 0)
        parts = self._train_parts if model.training else self._eval_parts
        parts.add(torch.cat([losses, errors]), torch.cat([weights, num_tokens]))
        # Data parallelism averages gradients over processes; the shares of the global batch are to be summed.
        loss = outputs.loss * (self.accelerator.num_processes if counts else 1)
        return (loss, outputs) if return_outputs else loss

    def _reads_own_features(self) -> bool:
        """Whether this step is one of `own_feature_share`: the same in all processes, and when training resumes."""
        step = random.Random(f"{self.args.seed} {self.state.global_step}")
        return step.random() < self.args.own_feature_share

    @torch.no_grad()
    def _own_features(self, model, inputs: dict, num_tokens: torch.Tensor) -> torch.Tensor | None:
        """(n, S, C) the images of a batch, those to be written as the model writes them; None where nothing is.

        A scale is written from the one before, so each pass makes one more scale of the first written image of a row
        what generation would; a later one of the row is written from images that were on their way. `inputs` then
        holds the encoder's features in place of pixels: they are the same for all passes, the last included.

        Args:
            num_tokens: (num_scales,) supervised in this batch.
        """
        # Sharded training waits for ever if one process runs the model more often than another.
        num_scales = int((self.accelerator.reduce(num_tokens, reduction="sum") > 0).sum())
        features = None
        for _ in range(num_scales - 1):
            outputs = model(**inputs, read_features=features, use_cache=False)
            features = outputs.predicted_features
            if inputs.pop("pixel_values", None) is not None:
                inputs["image_features"] = outputs.image_features
        return features

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs and not self._train_parts.is_empty:
            logs |= self._train_parts.averaged(self.accelerator)
            self._train_parts.clear()
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if prediction_loss_only:
            inputs = {**inputs, "skip_logits": True}
        num_rows = self._num_own_rows()
        if num_rows is not None:
            inputs = self._without_repeated(inputs, num_rows)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _without_repeated(self, inputs: dict, num_rows: int) -> dict:
        """The last batch of an evaluation without supervision of what follows its first `num_rows` rows."""
        image_token_id = self.accelerator.unwrap_model(self.model).config.image_token_id
        labels = inputs["labels"]
        row = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
        if "position_ids" in inputs:  # packed: where they start anew a row begins
            row = (inputs["position_ids"] == 0).cumsum(1) - 1
        repeated = row >= num_rows
        inputs = {**inputs, "labels": labels.masked_fill(repeated, -100)}
        if "image_loss_mask" in inputs:
            starts = ImagePositions.find(inputs["input_ids"], image_token_id).starts
            inputs["image_loss_mask"] = inputs["image_loss_mask"] & ~repeated[starts]
        return inputs

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        if not self._is_backbone_checked:
            self._check_backbone()
        self._eval_parts.clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        parts = self._eval_parts.averaged(self.accelerator)
        config = self.accelerator.unwrap_model(self.model).config
        if parts:
            parts["loss"] = (
                config.text_loss_weight * parts["text_loss"] + config.image_loss_weight * parts["image_loss"]
            )
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in parts.items()})
        return output


def _is_projection(name: str) -> bool:
    return "projector." in name or "image_head." in name
