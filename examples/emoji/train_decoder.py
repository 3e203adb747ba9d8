"""Train the decoder of one scale on cached features and latents:

python examples/emoji/train_decoder.py --scale 0 --cache runs/emoji/cache --out runs/emoji/unet_0
"""

from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from build_scenes import load_scenes
from cache_features import load_cache
from diffusers import DDPMScheduler
from emoji_tasks import SHOWN_ROLES
from emoji_training import EmojiPictures, count_parameters, load_pictures, parse_arguments, run_stage
from torch.utils.data import Dataset

from diffusers_puma import PumaUNet2DConditionModel
from diffusers_puma.training import (
    PumaDecoderTrainer,
    PumaDecoderTrainingArguments,
    feature_statistics,
    standardize_projection,
)

COMMON = dict(
    lr_scheduler_type="cosine",
    # At zero terminal SNR a picture starts from pure noise, and the offset would not be there at sampling.
    noise_offset=0.0,
    ema_decay=0.997,
)
PRESETS = {
    "cpu": dict(per_device_train_batch_size=24, learning_rate=1e-3, warmup_steps=100, save_steps=200, **COMMON),
    "gpu": dict(per_device_train_batch_size=256, learning_rate=1e-3, warmup_steps=1000, save_steps=5000, **COMMON),
}
# Steps by scale: as in the report, the finer a decoder's features, the more there is to learn.
MAX_STEPS = {"cpu": (1850, 1300, 1000, 600, 600), "gpu": (80000, 60000, 40000, 30000, 20000)}
# Of a decoder that starts from a trained one.
MORE_STEPS = {"cpu": (400, 800, 900, 1200, 700), "gpu": (20000, 20000, 20000, 20000, 20000)}


@dataclass
class DecoderArguments:
    scale: int = field(default=0, metadata={"help": "0 (finest, 256 tokens) to 4 (coarsest, 1 token)"})
    cache: str = field(default="runs/emoji/cache", metadata={"help": "folder that cache_features.py wrote"})
    scenes: str = field(default="data/emoji-scenes", metadata={"help": "folder that build_scenes.py wrote"})
    pretrained: str | None = field(default=None, metadata={"help": "a decoder to start from, of the same scale"})


def noise_scheduler() -> DDPMScheduler:
    """SDXL's noise levels, rescaled so that sampling may start from pure noise: most emoji are mainly white."""
    return DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def build_decoder(num_tokens: int, feature_dim: int, latent_size: int, channels: tuple[int, ...] = (64, 96)):
    """SDXL's UNet in small. The coordinate channels and the position table give its queries and keys their places."""
    blocks = len(channels)
    position_channels = 8
    return PumaUNet2DConditionModel(
        num_tokens=num_tokens,
        use_position_table=num_tokens > 1,
        position_channels=position_channels,
        sample_size=latent_size,
        in_channels=4 + position_channels,
        out_channels=4,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * blocks,
        up_block_types=("CrossAttnUpBlock2D",) * blocks,
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=[channel // 32 for channel in channels],
        norm_num_groups=16,
        use_linear_projection=True,
        encoder_hid_dim=feature_dim,
        encoder_hid_dim_type="text_proj",
    )


class CachedPictures(Dataset):
    """Rows for `PumaDecoderTrainer`: in each of `turns`, another picture of every concept in every style, so that the
    many variants of people don't crowd out the rest, and another third of the composed scenes."""

    def __init__(self, folder: str, split: str, pictures: EmojiPictures, scenes: datasets.Dataset, turns: int):
        self.caches = {name: load_cache(folder, f"{name}{split}") for name in ("", "scenes_")}
        groups = pictures.group_rows.split(pictures.group_sizes.tolist())
        shown = [row for row, role in enumerate(scenes["role"]) if role in SHOWN_ROLES]
        self.rows = []
        for turn in range(turns):
            self.rows += [("", int(rows[turn % len(rows)])) for rows in groups]
            self.rows += [("scenes_", row) for row in shown[turn % 3 :: 3]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        name, row = self.rows[index]
        cache = self.caches[name]
        return {"latents": cache["latents"][row].float(), "features": cache["features"][row].float()}


def main() -> None:
    stage, arguments, decoder = parse_arguments(
        "unet", PRESETS, extra=DecoderArguments, training_arguments=PumaDecoderTrainingArguments
    )
    if Path(stage.out).exists():
        return
    if arguments.max_steps < 0:
        arguments.max_steps = (MORE_STEPS if decoder.pretrained else MAX_STEPS)[stage.preset][decoder.scale]
    pictures, scenes = load_pictures(stage.data), load_scenes(decoder.scenes)

    def rows(split: str, turns: int) -> CachedPictures:
        return CachedPictures(decoder.cache, split, pictures[split], scenes[split], turns)

    cache = load_cache(decoder.cache, "train")
    num_tokens = cache["features"].shape[1] // 4**decoder.scale
    torch.manual_seed(arguments.seed)
    if decoder.pretrained:
        unet = PumaUNet2DConditionModel.from_pretrained(decoder.pretrained, torch_dtype=torch.float32)
    else:
        unet = build_decoder(num_tokens, cache["features"].shape[2], cache["latents"].shape[-1])
        standardize_projection(unet, *feature_statistics(cache["features"].split(512), num_tokens))
    trainer = PumaDecoderTrainer(
        unet,
        arguments,
        noise_scheduler=noise_scheduler(),
        null_features=cache["null_features"],
        train_dataset=rows("train", turns=6),
        eval_dataset=rows("heldout_concept", turns=1),
    )

    def save(folder: str) -> dict:
        trainer.save_model(folder)
        return {"parameters": count_parameters(unet), "heldout_concept": trainer.evaluate()}

    run_stage(trainer, stage.out, save)


if __name__ == "__main__":
    main()
