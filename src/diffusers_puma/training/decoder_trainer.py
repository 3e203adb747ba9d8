"""Trains one decoder at one scale on cached latents and features."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from ..unet_puma import PumaUNet2DConditionModel
from .arguments import PumaDecoderTrainingArguments
from .denoising_loss import denoising_loss, sample_noise
from .features import pool_to_tokens


class EMACallback(TrainerCallback):
    """Moves the averaged weights after every optimiser step, from wherever the run begins or resumes."""

    def __init__(self, ema: EMAModel, parameters: list[torch.nn.Parameter]) -> None:
        self.ema = ema
        self.parameters = parameters

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.ema.optimization_step = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.ema.step(self.parameters)


class PumaDecoderTrainer(Trainer):
    """`transformers.Trainer` for a decoder: the denoising objective, dropped pictures and averaged weights.

    Rows of the data sets hold `latents` (c, h, w), the VAE's times its scaling factor, and `features` (k_0, C), the
    encoder's at the finest scale or at any between it and the decoder's; they are pooled to the decoder's scale here.

    Every folder that it saves is a decoder with the averaged weights (`PumaUNet2DConditionModel.from_pretrained`); a
    checkpoint holds, next to it, the weights in training (`model.safetensors`) and the state that resumes them
    exactly. It runs on one process or data parallel.

    Args:
        model: the decoder. Its `num_tokens` says which scale is trained.
        args: the training arguments.
        noise_scheduler: noise levels and prediction type of the training; saved by the pipeline, not here.
        null_features: (1, k_0, C), the black image's features, which stand for a dropped picture.
        trainer_arguments: as in `transformers.Trainer`.
    """

    def __init__(
        self,
        model: PumaUNet2DConditionModel,
        args: PumaDecoderTrainingArguments,
        *,
        noise_scheduler: DDPMScheduler,
        null_features: torch.Tensor,
        **trainer_arguments: Any,
    ) -> None:
        if noise_scheduler.config.rescale_betas_zero_snr and noise_scheduler.config.prediction_type == "epsilon":
            raise ValueError("a schedule that ends at zero SNR needs prediction_type 'v_prediction', got 'epsilon'")
        super().__init__(model, args, **trainer_arguments)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("PumaDecoderTrainer runs on one process or data parallel, not with FSDP or DeepSpeed")
        self.noise_scheduler = noise_scheduler
        self.null_features = pool_to_tokens(null_features, model.config.num_tokens).float().to(args.device)
        self.ema = None
        self.trained_parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if args.ema_decay:
            self.ema = EMAModel(self.trained_parameters, decay=args.ema_decay, foreach=True)
            self.add_callback(EMACallback(self.ema, self.trained_parameters))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Denoising loss of a batch at random noise levels; randomness comes from the device's global generator."""
        latents = inputs["latents"].float()
        features = pool_to_tokens(inputs["features"].float(), self.null_features.shape[1])
        conditional = torch.rand(latents.shape[0], device=latents.device) >= self.args.image_dropout
        features = torch.where(conditional[:, None, None], features, self.null_features)

        noise = sample_noise(latents, self.args.noise_offset)
        levels = self.noise_scheduler.config.num_train_timesteps
        timesteps = torch.randint(levels, latents.shape[:1], device=latents.device)
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)

        prediction = model(noisy, timesteps, features, added_cond_kwargs={"conditional": conditional}).sample
        loss = denoising_loss(self.noise_scheduler, prediction, latents, noise, timesteps, self.args.min_snr_gamma)
        return (loss, {"prediction": prediction}) if return_outputs else loss

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within it the model has the averaged weights (its own, where none are kept)."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.trained_parameters)
        self.ema.copy_to(self.trained_parameters)
        try:
            yield
        finally:
            self.ema.restore(self.trained_parameters)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The training objective under the averaged weights, with noise that is the same at every evaluation."""
        with self.averaged_weights(), torch.random.fork_rng():
            torch.manual_seed(self.args.seed)
            return super().evaluate(*args, **kwargs)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss, None, None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        with self.averaged_weights():
            self.model.save_pretrained(output_dir or self.args.output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_file(self.model.state_dict(), os.path.join(output_dir, SAFE_WEIGHTS_NAME), metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.ema is not None:
            averaged = dict(PumaUNet2DConditionModel.from_pretrained(resume_from_checkpoint).named_parameters())
            names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
            for shadow, name in zip(self.ema.shadow_params, names, strict=True):
                shadow.copy_(averaged[name])

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
