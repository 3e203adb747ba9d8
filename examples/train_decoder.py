"""Train the decoder of one scale on pictures (report section A.1):

    accelerate launch --config_file examples/accelerate/ddp.yaml examples/train_decoder.py \\
        examples/configs/decoders.yaml --model puma-8b --scale 3 --data_root /data

Every argument of the YAML file but its sources can be given on the command line, which wins. The same command again
continues from the last whole checkpoint. The trained decoder is `OUTPUT_DIR/unet_SCALE`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from diffusers import AutoencoderKL, DDPMScheduler
from peft import LoraConfig
from training_recipe import DataArguments, parse_recipe, run, shows_samples
from transformers import CLIPVisionModel

from diffusers_puma import PumaPipeline, PumaUNet2DConditionModel
from diffusers_puma.training import PumaDecoderSampleCallback, PumaDecoderTrainer, PumaDecoderTrainingArguments
from transformers_puma import PumaImageProcessor, PumaProcessor
from transformers_puma.assembly import load_encoder

# Attention of the UNet's blocks, as LoRA training of SDXL has it.
LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass
class DecoderArguments:
    model: str = field(metadata={"help": "folder or Hub id with the decoder to start from, VAE and scheduler"})
    scale: int = field(metadata={"help": "0 (finest, 256 tokens) to 4 (coarsest, 1 token)"})
    encoder: str | None = field(
        default=None, metadata={"help": "folder or Hub id of the image encoder; None: the model's own"}
    )
    steps_per_scale: list[int] | None = field(
        default=None, metadata={"help": "steps of the decoder of each scale, finest first, where max_steps is not set"}
    )
    lora_r: int | None = field(default=None, metadata={"help": "rank of an adapter; None trains the whole decoder"})
    sample_steps: int = field(default=50, metadata={"help": "denoising steps of the validation set's reconstructions"})


def load_own_encoder(model: str) -> tuple[CLIPVisionModel, PumaImageProcessor | None]:
    """The encoder of a pipeline and what makes its pixels: of the language model, or one that is there without it."""
    index = PumaPipeline.load_config(model)
    if not index.get("image_encoder", [None])[0]:
        return load_encoder(model)
    has_processor = bool(index.get("processor", [None])[0])
    processor = PumaProcessor.from_pretrained(model, subfolder="processor") if has_processor else None
    return CLIPVisionModel.from_pretrained(model, subfolder="image_encoder"), processor and processor.image_processor


def main(argv: list[str] | None = None) -> None:
    arguments, decoder, data = parse_recipe((PumaDecoderTrainingArguments, DecoderArguments, DataArguments), argv)
    arguments.output_dir = str(Path(arguments.output_dir, f"unet_{decoder.scale}"))
    if arguments.max_steps < 0 and decoder.steps_per_scale:
        arguments.max_steps = decoder.steps_per_scale[decoder.scale]
    unet = PumaUNet2DConditionModel.from_pretrained(decoder.model, subfolder=f"unet_{decoder.scale}")
    if decoder.lora_r is not None:
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=decoder.lora_r, lora_alpha=decoder.lora_r, target_modules=LORA_LAYERS))
    encoder, image_processor = load_encoder(decoder.encoder) if decoder.encoder else load_own_encoder(decoder.model)
    trainer = PumaDecoderTrainer(
        unet,
        arguments,
        noise_scheduler=DDPMScheduler.from_pretrained(decoder.model, subfolder="scheduler"),
        image_encoder=encoder,
        image_processor=image_processor,
        vae=AutoencoderKL.from_pretrained(decoder.model, subfolder="vae"),
        train_dataset=data.load(arguments),
        eval_dataset=data.load_validation(arguments),
    )
    if trainer.eval_dataset is not None and shows_samples(arguments):
        trainer.add_callback(
            PumaDecoderSampleCallback(trainer, trainer.eval_dataset, num_inference_steps=decoder.sample_steps)
        )
    run(trainer)


if __name__ == "__main__":
    main()
