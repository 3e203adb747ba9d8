"""Samples of a fixed validation set at every evaluation, in the trackers that the trainer reports to anyway."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch.distributed.fsdp import register_fsdp_forward_method
from torchvision.transforms.functional import pil_to_tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback

from ..granularity import split_scales
from ..pictures import as_rgb
from .collator import Row, tidy_row

Features = dict[int, torch.Tensor]


@dataclass
class Sample:
    """What a model made of one validation row: a text, and the pictures that belong to it, from left to right."""

    text: str
    images: list[Image.Image]


class SampleCallback(TrainerCallback):
    """Writes samples to TensorBoard and Weights & Biases, whichever `report_to` names, at every evaluation.

    Randomness in `sample` is the same each time and disturbs none of the training. All processes sample, the first
    one writes.

    Args:
        trainer: whose model is sampled.
        rows: of the trainer's data sets, always the same ones.

    Raises:
        ValueError: no rows, or a trainer that reports to neither tracker.
    """

    def __init__(self, trainer: Trainer, rows: list[Row]) -> None:
        callbacks = trainer.callback_handler.callbacks
        if not any(isinstance(callback, (TensorBoardCallback, WandbCallback)) for callback in callbacks):
            raise ValueError(f"samples need report_to 'tensorboard' or 'wandb', got {trainer.args.report_to}")
        if not rows:
            raise ValueError("rows is empty: there is nothing to sample")
        self.trainer = trainer
        self.rows = rows
        self._last_step: int | None = None

    @abstractmethod
    def sample(self) -> list[Sample]:
        """One sample for each row."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self._last_step:  # several validation sets are evaluated one after the other
            return
        self._last_step = state.global_step
        self.trainer.model.eval()
        with torch.no_grad(), torch.random.fork_rng([args.device] if args.device.type == "cuda" else []):
            torch.manual_seed(args.seed)
            samples = self.sample()
        if not state.is_world_process_zero:
            return
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                _to_tensorboard(callback.tb_writer, samples, state.global_step)
            elif isinstance(callback, WandbCallback):
                _to_wandb(callback._wandb, samples, state.global_step)


class PumaSampleCallback(SampleCallback):
    """What the language model makes of validation rows, beside what it should have made.

    A row is continued from where it starts to be supervised: one whose completion is a picture is drawn, any other is
    answered in greedy decoding. Drawn features are compared with the encoder's, as `eval_drawn_mse_scale_i`: the model
    reads its own features here, so this is what generation will be like, and `mse_scale_i` of the training is not.

    Args:
        trainer, rows: see `SampleCallback`; rows are those of `PumaDataCollator`.
        decode: features `{scale: (1, k, C)}` of one image to a picture of it; without it there are no pictures. With a
            pipeline: `lambda features: pipe(image_features=features, scale=3).images[0]`.
        scale: the finest scale to draw. Written feature by feature (`autoregressive`), each finer one costs four times
            the steps.
        max_new_tokens: where answers are cut.

    Raises:
        ValueError: also for rows of which nothing is supervised, and for a trainer whose collator makes no labels.
    """

    def __init__(
        self,
        trainer: Trainer,
        rows: list[Row],
        *,
        decode: Callable[[Features], Image.Image] | None = None,
        scale: int = 0,
        max_new_tokens: int = 64,
    ) -> None:
        super().__init__(trainer, rows)
        if trainer.processing_class is None:
            raise ValueError("the trainer has no processing_class (the model's PumaProcessor) to read answers with")
        for row in rows:
            labels = trainer.data_collator([row]).get("labels")
            if labels is None or not (labels != -100).any():
                raise ValueError(f"a row to sample must have something supervised: {row}")
        self.decode = decode
        self.scale = scale
        self.max_new_tokens = max_new_tokens

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Of a model that FSDP shards, the weights outside its layers are there in `forward` alone, and in these.
        for method in ("encode_image", "generate_image_features", "generate"):
            if method not in vars(self.trainer.model):
                register_fsdp_forward_method(self.trainer.model, method)

    def sample(self) -> list[Sample]:
        errors: dict[int, list[float]] = {}
        samples = [self._continue(row, errors) for row in self.rows]
        if errors:
            self.trainer.log({f"eval_drawn_mse_scale_{s}": sum(e) / len(e) for s, e in sorted(errors.items())})
        return samples

    def _continue(self, row: Row, errors: dict[int, list[float]]) -> Sample:
        model, config = self.trainer.model, self.trainer.model.config
        batch = self.trainer._prepare_inputs(self.trainer.data_collator([row]))
        ids, is_label = batch["input_ids"], batch["labels"][0] != -100
        start = int(is_label.nonzero()[0])
        pictures_start = (is_label & (ids[0] == config.image_start_token_id)).nonzero()[:1].flatten().tolist()
        # A chat template puts a space before what the assistant says.
        draws = bool(pictures_start) and not self._read(ids[0, start : pictures_start[0]]).strip()
        start = pictures_start[0] if draws else start
        prompt = ids[:, : start + draws]
        num_images = int((prompt == config.image_end_token_id).sum())
        name = "image_features" if "image_features" in batch else "pixel_values"
        images = {name: batch[name][:num_images]} if num_images else {}
        pictures = self.trainer.processing_class.image_processor.fetch_images(list(tidy_row(row).get("images", [])))
        shown = [as_rgb(picture) for picture in pictures]
        asked = f"**given** {self._read(prompt[0])}"
        if not draws:
            answer = self._answer(prompt, images)
            return Sample(f"{asked}\n\n**wrote** {answer}\n\n**expected** {self._read(ids[0][is_label])}", shown)

        features = model.generate_image_features(prompt, scale=self.scale, **images)
        target = batch[name][num_images : num_images + 1]
        if name == "pixel_values":
            target = model.encode_image(target)
        else:
            target = split_scales(target, config.tokens_per_scale)
        for scale, drawn in features.items():
            errors.setdefault(scale, []).append(F.mse_loss(drawn.float(), target[scale].float()).item())
        drawn = [self.decode(features)] if self.decode is not None else []
        return Sample(f"{asked}\n\n**drew** scales {sorted(features)}", shown + drawn)

    def _answer(self, prompt: torch.Tensor, images: dict[str, torch.Tensor]) -> str:
        model, config = self.trainer.model, self.trainer.model.config
        sequences = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            **images,
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            suppress_tokens=[config.image_start_token_id, config.image_token_id, config.image_end_token_id],
        )
        return self._read(sequences[0, prompt.shape[1] :])

    def _read(self, ids: torch.Tensor) -> str:
        return self.trainer.processing_class.tokenizer.decode(ids[ids != self.trainer.model.config.image_token_id])


def _to_tensorboard(writer: Any, samples: list[Sample], step: int) -> None:
    for i, sample in enumerate(samples):
        writer.add_text(f"samples/{i}", sample.text, step)
        if sample.images:
            writer.add_image(f"samples/{i}", pil_to_tensor(side_by_side(sample.images)), step)
    writer.flush()


def _to_wandb(wandb: Any, samples: list[Sample], step: int) -> None:
    table = wandb.Table(["sample", "text"], [[i, sample.text] for i, sample in enumerate(samples)])
    pictures = {
        f"samples/{i}": wandb.Image(side_by_side(sample.images), caption=sample.text)
        for i, sample in enumerate(samples)
        if sample.images
    }
    wandb.log({"samples/texts": table, **pictures, "train/global_step": step})


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """One RGB picture of several, left to right, as high as the highest."""
    sheet = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), "white")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    return sheet
