"""What a decoder's training shows of itself."""

from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from transformers_puma.training.callbacks import Sample, SampleCallback

from ..pipeline_puma import PumaPipeline
from ..unet_puma import PumaUNet2DConditionModel

if TYPE_CHECKING:
    from .decoder_trainer import PumaDecoderTrainer


class DecoderTensorBoardCallback(TensorBoardCallback):
    """The stock callback asks a model's config for its JSON, and diffusers' configs are plain dicts."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PumaUNet2DConditionModel,
        **kwargs: Any,
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.tb_writer is not None:
            self.tb_writer.add_text("model_config", model.to_json_string())


class PumaDecoderSampleCallback(SampleCallback):
    """Reconstructions of fixed pictures with the averaged weights and always the same noise, right of what the VAE
    makes of the original.

    Args:
        trainer, rows: see `SampleCallback`.
        vae: needed where the trainer has none, because its rows hold latents.
        num_inference_steps: of the sampler, which is the training's `DDPMScheduler`.
        guidance_scale: as in `PumaPipeline`.
    """

    def __init__(
        self,
        trainer: "PumaDecoderTrainer",
        rows: list[dict],
        *,
        vae: AutoencoderKL | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
    ) -> None:
        super().__init__(trainer, rows)
        if vae is None and trainer.picture_encoder is None:
            raise ValueError("vae is needed to see the latents that the trainer's rows hold")
        self.vae = (trainer.picture_encoder.vae if vae is None else vae).to(trainer.args.device)
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale

    def sample(self) -> list[Sample]:
        trainer, scale = self.trainer, self.trainer.scale
        pipe = PumaPipeline(vae=self.vae, scheduler=trainer.noise_scheduler, **{f"unet_{scale}": trainer.model})
        pipe.set_progress_bar_config(disable=True)
        latents, features = trainer.encode(trainer._prepare_inputs(trainer.data_collator(self.rows)))
        originals = pipe.image_processor.postprocess(pipe.decode_latents(latents), "pil")
        with trainer.averaged_weights():
            decoded = pipe(
                image_features={scale: features},
                negative_image_features={scale: trainer.null_features},
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                height=latents.shape[-2] * pipe.vae_scale_factor,
                width=latents.shape[-1] * pipe.vae_scale_factor,
                generator=[torch.Generator().manual_seed(trainer.args.seed + i) for i in range(len(latents))],
            ).images
        pairs = zip(originals, decoded, strict=True)
        return [Sample(f"original and scale {scale}", [original, ours]) for original, ours in pairs]
