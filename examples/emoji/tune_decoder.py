"""Tune the decoder of one scale to features that a language model wrote:

    python examples/emoji/tune_decoder.py --scale 0 --pretrained runs/emoji/unet_0 --drawn runs/emoji/drawn \
        --out runs/emoji/unet_0_tuned

The language model's features of the finest scale are smoother than any that the encoder gives, and a decoder that
knows the encoder's alone shows blurs. A part of the rows keeps the encoder's, so that it still decodes pictures.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from draw_features import load_drawn
from emoji_training import parse_arguments
from torch.utils.data import Dataset
from train_decoder import COMMON, held_out_rows, train

from diffusers_puma import PumaUNet2DConditionModel
from diffusers_puma.training import PumaDecoderTrainingArguments, pool_to_tokens

PRESETS = {
    "cpu": dict(
        max_steps=700, per_device_train_batch_size=24, learning_rate=5e-4, warmup_steps=30, save_steps=100, **COMMON
    ),
    "gpu": dict(
        max_steps=10000,
        per_device_train_batch_size=256,
        learning_rate=5e-4,
        warmup_steps=300,
        save_steps=2000,
        **COMMON,
    ),
}


@dataclass
class TuningArguments:
    pretrained: str = field(default="runs/emoji/unet_0", metadata={"help": "the decoder to start from"})
    scale: int = field(default=0, metadata={"help": "0 (finest, 256 tokens) to 4 (coarsest, 1 token)"})
    drawn: str = field(default="runs/emoji/drawn", metadata={"help": "folder that draw_features.py wrote"})
    written_share: float = field(default=0.5, metadata={"help": "of rows with the language model's features"})
    cache: str = field(default="runs/emoji/cache", metadata={"help": "folder that cache_features.py wrote"})
    scenes: str = field(default="data/emoji-scenes", metadata={"help": "folder that build_scenes.py wrote"})


class DrawnPictures(Dataset):
    """Rows for `PumaDecoderTrainer`: a share of the pictures with the features that were written for them, the others
    with the encoder's, both at the decoder's scale."""

    def __init__(self, folder: str, scale: int, written_share: float):
        tensors = load_drawn(folder, ["latents", "features", f"written_{scale}"])
        self.latents, written = tensors["latents"], tensors[f"written_{scale}"]
        batches = tensors["features"].split(256)
        true = torch.cat([pool_to_tokens(batch.float(), written.shape[1]).half() for batch in batches])
        is_written = [random.Random(f"{row} {scale}").random() < written_share for row in range(len(written))]
        self.features = torch.where(torch.tensor(is_written)[:, None, None], written, true)

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"latents": self.latents[index].float(), "features": self.features[index].float()}


def main() -> None:
    stage, arguments, tuning = parse_arguments(
        "unet_tuned", PRESETS, extra=TuningArguments, training_arguments=PumaDecoderTrainingArguments
    )
    if Path(stage.out).exists():
        return
    rows = DrawnPictures(tuning.drawn, tuning.scale, tuning.written_share)
    torch.manual_seed(arguments.seed)
    unet = PumaUNet2DConditionModel.from_pretrained(tuning.pretrained, torch_dtype=torch.float32)
    train(unet, arguments, rows, held_out_rows(tuning.cache, stage.data, tuning.scenes), stage.out)


if __name__ == "__main__":
    main()
