"""Trains one decoder at one scale, whole or through LoRA, on pictures or on cached latents and features."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.training_utils import EMAModel, cast_training_params
from huggingface_hub import ModelCard
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import EvalLoopOutput, HubStrategy

from transformers_puma import PumaImageProcessor
from transformers_puma.granularity import MAX_SCALES
from transformers_puma.training.arguments import adopt_arguments
from transformers_puma.training.checkpoints import ResumableTrainerMixin

from ..loading import fetch_lora_state_dict
from ..pipeline_inputs import is_scale
from ..pipeline_puma import PumaPipeline
from ..unet_puma import PumaUNet2DConditionModel
from .arguments import PumaDecoderTrainingArguments
from .averaging import EMACallback
from .callbacks import DecoderTensorBoardCallback
from .denoising_loss import denoising_loss, draw
from .features import pool_to_tokens, scale_of
from .pictures import PictureEncoder, PumaDecoderCollator, collate_cached

# Beside the averaged weights of a checkpoint; no name that is looked for in a model folder, here or on the Hub.
TRAINED_WEIGHTS_NAME = "training_weights.safetensors"
HALF = {torch.float16, torch.bfloat16}


class PumaDecoderTrainer(ResumableTrainerMixin):
    """`transformers.Trainer` for a decoder: the denoising objective, dropped pictures and averaged weights.

    Rows of the data sets hold either `latents` (c, h, w), the VAE's times its scaling factor, and `features` (k_0, C),
    the encoder's at the finest scale or at any between it and the decoder's (they are pooled to the decoder's scale
    here); or, given `image_encoder` and `vae`, an `image` (PIL).

    Every folder that it saves is a decoder with the averaged weights (`PumaUNet2DConditionModel.from_pretrained`); a
    checkpoint holds, next to it, the weights in training (`training_weights.safetensors`) and the state that
    resumes them exactly. A model to which `add_adapter` has added LoRA weights trains and saves those alone, in fp32
    whatever the decoder's precision, and in the form that `PumaPipeline.load_lora_weights` reads.

    It runs on one process or data parallel. Noise, noise levels and dropped pictures are drawn from (seed, step,
    place in the global batch), so processes share no draws, and any number of them computes the same.

    Args:
        model: the decoder, in fp32 unless it has an adapter.
        args: the training arguments.
        noise_scheduler: noise levels and prediction type of the training; saved by the pipeline, not here.
        null_features: (1, k_0, C), the black image's features, which stand for a dropped picture; by default those of
            `image_encoder`.
        image_encoder, vae: encode rows of pictures; frozen.
        image_processor: the encoder's; by default one with CLIP's mean and standard deviation.
        scale: whose decoder this is, which an adapter's file tells. By default the one that has `num_tokens` where
            the finest has as many tokens as `image_encoder` gives, or else `null_features`.
        trainer_arguments: as in `transformers.Trainer`.

    Raises:
        ValueError: arguments that do not fit each other or the decoder; later, rows that do not.
    """

    def __init__(
        self,
        model: PumaUNet2DConditionModel,
        args: PumaDecoderTrainingArguments,
        *,
        noise_scheduler: DDPMScheduler,
        null_features: torch.Tensor | None = None,
        image_encoder: CLIPVisionModel | None = None,
        vae: AutoencoderKL | None = None,
        image_processor: PumaImageProcessor | None = None,
        scale: int | None = None,
        **trainer_arguments: Any,
    ) -> None:
        args = adopt_arguments(PumaDecoderTrainingArguments, args)
        if noise_scheduler.config.rescale_betas_zero_snr and noise_scheduler.config.prediction_type == "epsilon":
            raise ValueError("a schedule that ends at zero SNR needs prediction_type 'v_prediction', got 'epsilon'")
        if (image_encoder is None) != (vae is None):
            raise ValueError("rows of pictures need both image_encoder and vae, got one of them")
        if image_encoder is None and null_features is None:
            raise ValueError("null_features is needed where there is no image_encoder to encode the black image")
        if scale is not None and not is_scale(scale):
            raise ValueError(f"scale must be 0..{MAX_SCALES - 1}, got {scale!r}")
        self.picture_encoder, collator = None, collate_cached
        if image_encoder is not None:
            factor = 2 ** (len(vae.config.block_out_channels) - 1)
            resolution = args.resolution or model.config.sample_size * factor
            if resolution % factor:
                raise ValueError(f"resolution must be a multiple of the VAE's {factor}, got {resolution}")
            self.picture_encoder = PictureEncoder(image_encoder, vae, args.device, image_processor)
            collator = PumaDecoderCollator(image_encoder.config.image_size, resolution, image_processor)
            null_features = self.picture_encoder.null_features() if null_features is None else null_features
        elif args.resolution is not None or image_processor is not None:
            raise ValueError(
                "resolution and image_processor are for rows of pictures: image_encoder and vae are needed"
            )
        trainer_arguments.setdefault("data_collator", collator)
        super().__init__(model, args, **trainer_arguments)
        if self.label_smoother is not None or self.compute_loss_func is not None or self.compute_metrics is not None:
            raise ValueError(
                "the loss is that of denoising: label_smoothing_factor, compute_loss_func and compute_metrics have no "
                "part"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("PumaDecoderTrainer runs on one process or data parallel, not with FSDP or DeepSpeed")
        if self.pop_callback(TensorBoardCallback):
            self.add_callback(DecoderTensorBoardCallback)
        self.noise_scheduler = noise_scheduler
        adapters = model.active_adapters() if model._hf_peft_config_loaded else []
        if len(adapters) > 1:
            raise ValueError(
                f"one adapter is trained and saved at a time, but {adapters} are active: set_adapters(one)"
            )
        self.adapter_name = adapters[0] if adapters else None
        self._take_null_features(null_features, scale)
        self._take_precision()
        self.trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not self.trained:
            raise ValueError("no weight of the decoder requires a gradient: add_adapter, or requires_grad_(True)")
        self.trained_parameters = list(self.trained.values())
        self.ema = None
        if args.ema_decay:
            self.ema = EMAModel(self.trained_parameters, decay=args.ema_decay, foreach=True)
            self.add_callback(EMACallback(self.ema, self.trained_parameters))

    def _take_null_features(self, features: torch.Tensor, scale: int | None) -> None:
        """Sets `scale`, `finest_tokens` (k_0) and `null_features` (1, k, C)."""
        tokens, channels = self.model.config.num_tokens, self.model.config.encoder_hid_dim
        shape = tuple(features.shape)
        if len(shape) != 3 or shape[0] != 1 or shape[2] != channels:
            raise ValueError(f"null_features must be of shape (1, tokens, {channels}), got {shape}")
        finest = shape[1] if self.picture_encoder is None else self.picture_encoder.num_tokens
        self.scale = scale_of(tokens, finest) if scale is None else scale
        self.finest_tokens = tokens * 4**self.scale
        if shape[1] > self.finest_tokens:
            raise ValueError(f"null_features have {shape[1]} tokens, the finest scale has {self.finest_tokens}")
        self.null_features = pool_to_tokens(features, tokens).float().to(self.args.device)

    def _take_precision(self) -> None:
        """Makes an adapter fp32: peft gives it the precision of the decoder, in which small updates round away."""
        if self.adapter_name is not None:
            cast_training_params(self.model)
        half = {parameter.dtype for parameter in self.model.parameters() if parameter.requires_grad} & HALF
        if half:
            raise ValueError(
                f"weights to train must be in torch.float32, got {half.pop()}: load the decoder in float32, and pass "
                "bf16=True to compute in half precision"
            )
        if self.model.dtype in HALF and self.accelerator.mixed_precision == "no":
            raise ValueError(f"a frozen decoder in {self.model.dtype} needs mixed precision: pass bf16=True")

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """Tells each micro-batch where in the global batch it starts.

        A data loader deals its batches to the processes in turn, so the places are those of one process that takes
        them all.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for micro_step, batch in enumerate(batches):
            turn = micro_step * self.args.world_size + self.args.process_index
            batch["first_place"] = turn * self._train_batch_size
        return batches, num_items

    def encode(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (B, c, h, w) and features at the decoder's scale (B, k, C) of a collated batch, in fp32."""
        if "latents" in inputs:
            latents, features = inputs["latents"], inputs["features"]
        else:
            latents = self.picture_encoder.latents(inputs["pictures"])
            features = self.picture_encoder.features(inputs["pixel_values"])
        self._check_batch(latents, features)
        return latents.float(), pool_to_tokens(features.float(), self.null_features.shape[1])

    def _check_batch(self, latents: torch.Tensor, features: torch.Tensor) -> None:
        config = self.model.config
        channels = config.in_channels - config.position_channels
        if latents.dim() != 4 or latents.shape[1] != channels:
            raise ValueError(f"a batch's latents must be (rows, {channels}, h, w), got {tuple(latents.shape)}")
        shape = tuple(features.shape)
        if len(shape) != 3 or shape[2] != config.encoder_hid_dim:
            raise ValueError(f"a batch's features must be (rows, tokens, {config.encoder_hid_dim}), got {shape}")
        if self.adapter_name is not None and shape[1] > self.finest_tokens:  # its file tells the scale
            raise ValueError(
                f"features have {shape[1]} tokens, and the finest scale {self.finest_tokens}, going by null_features "
                "or scale"
            )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor | int],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Denoising loss of a batch at random noise levels; `first_place` is its place in the global batch."""
        latents, features = self.encode(inputs)
        step = self.state.global_step + 1 if model.training else 0  # every evaluation draws the same
        keys = [(self.args.seed, step, inputs["first_place"] + i) for i in range(len(latents))]
        levels = self.noise_scheduler.config.num_train_timesteps
        noise, timesteps, conditional = draw(latents, keys, levels, self.args.noise_offset, self.args.image_dropout)
        features = torch.where(conditional[:, None, None], features, self.null_features)
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

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """The training objective under the averaged weights, with noise that is the same at every evaluation."""
        self._evaluated_batches = 0
        self._evaluated = torch.zeros(2, device=self.args.device)  # sum of the rows' losses, and their number
        with self.averaged_weights():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        loss, rows = self.accelerator.reduce(self._evaluated).tolist()
        if rows:
            output.metrics[f"{metric_key_prefix}_loss"] = loss / rows
        return output

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        turn = self._evaluated_batches * self.args.world_size + self.args.process_index
        self._evaluated_batches += 1
        inputs = self._prepare_inputs(inputs)
        rows = len(next(iter(inputs.values())))
        own = self._num_own_rows()
        if own is not None and own < rows:
            rows = max(own, 0)
            # A process without a row of its own runs the model as the others do, for nothing.
            inputs = {name: value[: max(rows, 1)] for name, value in inputs.items()}
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, {**inputs, "first_place": turn * self.args.eval_batch_size})
        self._evaluated += torch.stack([loss.detach() * rows, loss.new_tensor(rows)]).float()
        return loss, None, None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        with self.averaged_weights():
            if self.adapter_name is None:
                self.model.save_pretrained(folder)
            else:
                layers = get_peft_model_state_dict(self.model, adapter_name=self.adapter_name)
                settings = self.model.peft_config[self.adapter_name].to_dict()
                PumaPipeline.save_lora_weights(
                    folder, {self.scale: layers}, unet_lora_adapter_metadata={self.scale: settings}
                )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            weights = {name: parameter.detach() for name, parameter in self.trained.items()}
            save_file(weights, os.path.join(output_dir, TRAINED_WEIGHTS_NAME), metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.ema is not None:
            self._load_average(resume_from_checkpoint)
        weights = load_file(os.path.join(resume_from_checkpoint, TRAINED_WEIGHTS_NAME))
        missing = sorted(self.trained.keys() - weights.keys())
        if missing:
            raise ValueError(f"{resume_from_checkpoint} is of another model: it has no {missing[0]}")
        self.model.load_state_dict(weights, strict=False)  # frozen weights are as the model came

    def _load_average(self, folder: str) -> None:
        """What `_save` wrote, into the model and its averaged weights."""
        if self.adapter_name is None:
            self.model.load_state_dict(PumaUNet2DConditionModel.from_pretrained(folder).state_dict())
        else:
            layers, _ = fetch_lora_state_dict(folder)
            prefix = f"unet_{self.scale}."
            layers = {name.removeprefix(prefix): weight for name, weight in layers.items()}
            set_peft_model_state_dict(self.model, layers, adapter_name=self.adapter_name)
        if self.ema is not None:
            for shadow, parameter in zip(self.ema.shadow_params, self.trained_parameters, strict=True):
                shadow.copy_(parameter.detach())

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in transformers, which copies from the checkpoint only files of its own names."""
        if self.args.hub_strategy != HubStrategy.END:
            self._save()
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; what loads the folder is diffusers."""
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        file = os.path.join(self.args.output_dir, "README.md")
        card = ModelCard.load(file)
        card.data["library_name"] = "diffusers"
        if self.adapter_name is not None:
            card.data.tags = sorted({*(card.data.tags or []), "lora"})
        card.save(file)

    def _load_best_model(self) -> None:
        self._load_average(self.state.best_model_checkpoint)
