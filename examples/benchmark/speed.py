"""Speed beside the stock classes, as the median ratio of interleaved pairs: above 1 is faster than stock.

    python examples/benchmark/speed.py                                       # small models, CPU
    python examples/benchmark/speed.py --model hub_configs/puma-1b --dtype bfloat16   # on a GPU

- language model: a step of `PumaTrainer` (forward, loss, backward) against one of `transformers.Trainer` with the same
  backbone as a stock causal model on the same tokens; with pictures that are encoded, and with cached features.
- decoder: a step of `PumaDecoderTrainer` on cached latents and features against the usual training step of SDXL with
  diffusers: the same UNet with text embeddings (77 tokens) and SDXL's added conditions; and against that UNet with a
  projection of its text that is trained (`encoder_hid_dim_type="text_proj"`), as PUMA's of the features is.
- generation: `generate_image_features` against stock `generate`, for the same number of tokens after the same prompt.

Weights are random; what is timed does not depend on them. A pair is one call of each in random order, so that whatever
else the machine does hits both; `--processor_time` counts what this process alone computes, for a CPU that is busy.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from diffusers_puma import PumaUNet2DConditionModel
from diffusers_puma.training import PumaDecoderTrainer, PumaDecoderTrainingArguments
from transformers_puma import PumaConfig, PumaForConditionalGeneration
from transformers_puma.training import PumaTrainer, PumaTrainingArguments

LAYERS = {"num_hidden_layers": 4, "num_attention_heads": 4}
SMALL = {
    "text_config": {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 704,
        "vocab_size": 4096,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **LAYERS,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 512,
        "image_size": 64,
        "patch_size": 4,
        **LAYERS,
    },
    "image_start_token_id": 4000,
    "image_end_token_id": 4001,
    "image_token_id": 4002,
}
SMALL_UNET = {
    "sample_size": 16,
    "block_out_channels": (64, 96),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 3),
    "norm_num_groups": 16,
    "cross_attention_dim": 128,
    "transformer_layers_per_block": 1,
    "use_linear_projection": True,
}
SDXL_TEXT_TOKENS, SDXL_POOLED, SDXL_TIME_DIM = 77, 1280, 256


def ratio(ours: Callable[[], object], stock: Callable[[], object], args: argparse.Namespace) -> dict:
    """Time of `stock` over time of `ours`: median and quartiles over pairs, after one pair to warm up."""
    clock = time.process_time if args.processor_time else time.perf_counter

    def seconds(call: Callable[[], object]) -> float:
        start = clock()
        call()
        if torch.device(args.device).type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    pairs = args.pairs
    order = random.Random(0)
    ratios, ours_seconds = [], []
    for pair in range(pairs + 1):
        calls = [("ours", ours), ("stock", stock)]
        order.shuffle(calls)
        taken = {name: seconds(call) for name, call in calls}
        if pair:
            ratios.append(taken["stock"] / taken["ours"])
            ours_seconds.append(taken["ours"])
    low, median, high = statistics.quantiles(ratios, n=4)
    return {"ratio": median, "quartiles": [low, high], "seconds": statistics.median(ours_seconds), "pairs": pairs}


def build_config(folder: str | None) -> PumaConfig:
    return PumaConfig(**SMALL) if folder is None else PumaConfig.from_pretrained(folder)


def drawing_batch(config: PumaConfig, batch_size: int, text_length: int) -> dict[str, torch.Tensor]:
    """Rows of the form caption, picture: all supervised, and pictures as random pixels."""
    start, end, placeholder = config.image_start_token_id, config.image_end_token_id, config.image_token_id
    text = torch.randint(3, min(start, placeholder), (batch_size, text_length))
    image = torch.tensor([start, *[placeholder] * config.image_seq_length, end]).expand(batch_size, -1)
    input_ids = torch.cat([text, image], dim=1)
    side = config.vision_config.image_size
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": torch.where(input_ids == placeholder, -100, input_ids),
        "pixel_values": torch.randn(batch_size, 3, side, side),
        "image_loss_mask": torch.ones(batch_size, dtype=torch.bool),
    }


def training_steps(trainer: Trainer, batch: dict[str, torch.Tensor]) -> Callable[[], object]:
    """A call is one step of the trainer's own loop up to the optimiser, whose time is the same for both."""
    if trainer.args.gradient_checkpointing:  # as `train` does before its first step
        trainer.model.activation_checkpointing_enable()
    trainer.create_optimizer()
    model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    model.train()
    trainer.current_gradient_accumulation_steps = 1

    def step() -> None:
        batches, counts = trainer.get_batch_samples(iter([dict(batch)]), 1, trainer.args.device)
        trainer.training_step(model, batches[0], counts)
        model.zero_grad()

    return step


def language_model(args: argparse.Namespace, device: torch.device, folder: str) -> dict[str, dict]:
    config = build_config(args.model)
    options = {"output_dir": folder, "report_to": "none", "use_cpu": device.type == "cpu", "disable_tqdm": True}
    options |= {"bf16": args.dtype == "bfloat16", "gradient_checkpointing": args.gradient_checkpointing}
    batch = drawing_batch(config, args.batch_size, args.text_length)
    puma = PumaForConditionalGeneration(config)
    cached = {name: value for name, value in batch.items() if name != "pixel_values"}
    channels = config.vision_config.hidden_size
    cached["image_features"] = torch.randn(args.batch_size, config.image_seq_length, channels)
    plain = {name: batch[name] for name in ("input_ids", "attention_mask")} | {"labels": batch["input_ids"]}

    stock_model = AutoModelForCausalLM.from_config(config.text_config)
    stock = training_steps(Trainer(stock_model, TrainingArguments(**options)), plain)
    results = {}
    for name, rows in (("pictures", batch), ("cached features", cached)):
        trainer = PumaTrainer(puma, PumaTrainingArguments(**options), data_collator=lambda rows: rows)
        results[f"language model, {name}"] = ratio(training_steps(trainer, rows), stock, args)
    return results


def sdxl_step(unet: UNet2DConditionModel, scheduler: DDPMScheduler, latents: torch.Tensor, args: argparse.Namespace):
    """Loss and gradient of diffusers' `train_text_to_image_sdxl.py`, given latents and text embeddings."""
    device, count = latents.device, len(latents)
    channels = unet.config.encoder_hid_dim or unet.config.cross_attention_dim
    text = torch.randn(count, SDXL_TEXT_TOKENS, channels, device=device)
    added = {
        "text_embeds": torch.randn(count, SDXL_POOLED, device=device),
        "time_ids": torch.zeros(count, 6, device=device),
    }

    def step() -> None:
        noise = torch.randn_like(latents)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (count,), device=device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            prediction = unet(noisy, timesteps, text, added_cond_kwargs=added).sample
        F.mse_loss(prediction.float(), noise).backward()
        unet.zero_grad()

    return step


def decoder(args: argparse.Namespace, device: torch.device, folder: str) -> dict[str, dict]:
    config = build_config(args.model)
    tokens, channels = config.tokens_per_scale[args.scale], config.vision_config.hidden_size
    if args.model is None:
        shape = SMALL_UNET
    else:
        loaded = PumaUNet2DConditionModel.load_config(Path(args.model, f"unet_{args.scale}"))
        shape = {name: loaded[name] for name in SMALL_UNET}
    projected = {"encoder_hid_dim": channels, "encoder_hid_dim_type": "text_proj"}
    puma = PumaUNet2DConditionModel(**shape, **projected, num_tokens=tokens)
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SDXL_TIME_DIM,
        "projection_class_embeddings_input_dim": SDXL_POOLED + 6 * SDXL_TIME_DIM,
    }
    stocks = {"plain": UNet2DConditionModel(**shape, **added)}
    stocks["text projected"] = UNet2DConditionModel(**shape, **added, **projected)
    if args.gradient_checkpointing:
        for stock in stocks.values():
            stock.enable_gradient_checkpointing()
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    options = PumaDecoderTrainingArguments(
        folder,
        report_to="none",
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
        bf16=args.dtype == "bfloat16",
        gradient_checkpointing=args.gradient_checkpointing,
    )
    latents = torch.randn(args.batch_size, 4, shape["sample_size"], shape["sample_size"])
    batch = {"latents": latents, "features": torch.randn(args.batch_size, tokens, channels)}
    trainer = PumaDecoderTrainer(
        puma, options, noise_scheduler=scheduler, null_features=torch.zeros(1, config.tokens_per_scale[0], channels)
    )
    ours = training_steps(trainer, batch)
    return {
        f"decoder of {tokens} tokens, {name}": ratio(
            ours, sdxl_step(stock.to(device).train(), scheduler, latents.to(device), args), args
        )
        for name, stock in stocks.items()
    }


@torch.no_grad()
def generation(args: argparse.Namespace, device: torch.device, folder: str) -> dict[str, dict]:
    config = build_config(args.model)
    dtype = getattr(torch, args.dtype)
    puma = PumaForConditionalGeneration(config).to(device, dtype).eval()
    stock = AutoModelForCausalLM.from_config(config.text_config).to(device, dtype).eval()
    text = torch.randint(3, config.image_start_token_id, (args.batch_size, args.text_length), device=device)
    text[:, -1] = config.image_start_token_id
    inputs = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    tokens = sum(config.tokens_per_scale[args.scale :])
    limits = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    def ours() -> None:
        puma.generate_image_features(**inputs, scale=args.scale)

    def theirs() -> None:
        stock.generate(**inputs, **limits)

    return {f"generation of {tokens} tokens": ratio(ours, theirs, args)}


BENCHMARKS = {"language_model": language_model, "decoder": decoder, "generation": generation}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=list(BENCHMARKS), help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--model", help="folder with configurations, such as hub_configs/puma-1b; default: small ones")
    parser.add_argument("--scale", type=int, default=1, help="of the decoder, and finest of the generation")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--text_length", type=int, default=64, help="tokens of text before each picture")
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processor_time", action="store_true", help="time that this process computes, on a CPU")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    if args.processor_time and args.device != "cpu":
        parser.error(f"--processor_time is for --device cpu, got {args.device}: a GPU computes beside the process")
    unknown = sorted(set(args.what) - set(BENCHMARKS))
    if unknown or args.pairs < 2:
        parser.error(
            f"expected some of {', '.join(BENCHMARKS)} and --pairs of at least 2, got {unknown or args.pairs}"
        )

    torch.manual_seed(0)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.what:
            results |= BENCHMARKS[name](args, torch.device(args.device), folder)
    for name, found in results.items():
        low, high = found["quartiles"]
        print(f"{name:<40} {found['ratio']:.3f} of stock ({low:.3f} to {high:.3f}), {found['seconds']:.3f} s")
    if args.out:
        args.out.write_text(json.dumps({"arguments": vars(args) | {"out": str(args.out)}, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
