"""What the training stages of the small model share: pictures in memory, augmentation, arguments, running.

A stage is one script. It writes its final folder in one rename, so that the folder is whole or absent; its checkpoints
are in `OUT.checkpoints` beside it. The same command again resumes from the last checkpoint, or does nothing once `OUT`
is there.

Legend: B pictures in a batch, n pictures of a split; pixels are (B, 3, H, W) in [0, 1] unless said to be uint8.
"""

import json
import os
import shutil
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from build_dataset import load_emoji, to_uint8
from datasets import Dataset
from emoji_pictures import colour_of
from torch import nn
from transformers import HfArgumentParser, TrainingArguments

from transformers_puma.training.checkpoints import ResumableTrainerMixin

COLOURINGS = ("", " in grey", " in inverted colours")
COLOURING_WEIGHTS = (0.90, 0.05, 0.05)
TEXT_COLUMNS = ["name", "style", "tags", "base", "codepoints", "group", "tone", "gender"]


@dataclass
class StageArguments:
    data: str = field(default="data/emoji", metadata={"help": "folder that build_dataset.py wrote"})
    out: str = field(default="", metadata={"help": "folder of the trained part (default: runs/emoji/STAGE)"})
    preset: str = field(default="cpu", metadata={"help": "defaults of the training arguments: cpu or gpu"})


def has_bfloat16() -> bool:
    """Whether this machine computes in bfloat16. A CPU that does not emulates it, slower than single precision."""
    capabilities = torch.cpu.get_capabilities()
    return torch.cuda.is_available() or any(capabilities[name] for name in capabilities if name.endswith("bf16"))


def parse_arguments(
    stage: str,
    presets: dict[str, dict],
    argv: list[str] | None = None,
    extra: type | None = None,
    training_arguments: type[TrainingArguments] = TrainingArguments,
) -> tuple:
    """(StageArguments, TrainingArguments[, extra]) of a stage: the preset gives defaults, the command line wins."""
    types = [StageArguments, training_arguments] + ([extra] if extra else [])
    parser = HfArgumentParser(types)
    parser.set_defaults(out=f"runs/emoji/{stage}")
    chosen = parser.parse_known_args(argv)[0]
    if chosen.preset not in presets:
        raise ValueError(f"--preset is {chosen.preset!r}; it must be one of {sorted(presets)}")
    parser.set_defaults(
        output_dir=f"{chosen.out}.checkpoints",
        use_cpu=not torch.cuda.is_available(),
        bf16=has_bfloat16(),
        remove_unused_columns=False,
        dataloader_drop_last=True,
        report_to="none",
        logging_steps=50,
        save_total_limit=2,
        **presets[chosen.preset],
    )
    return parser.parse_args_into_dataclasses(argv)


class EmojiPictures:
    """A split in memory: `pixels` uint8 (n, 3, 64, 64), `texts` one dict a picture, and groups of its pictures.

    Skin tones of people are half of all pictures. A group is one concept in one style; training draws groups evenly
    and one picture of each, so that those variants don't crowd out the rest.
    """

    def __init__(self, split: Dataset):
        self.pixels = torch.from_numpy(to_uint8(split)).permute(0, 3, 1, 2).contiguous()
        self.texts = split.select_columns(TEXT_COLUMNS).to_list()
        rows_of: dict[tuple[str, str], list[int]] = {}
        for row, text in enumerate(self.texts):
            rows_of.setdefault((text["base"], text["style"]), []).append(row)
        self.group_sizes = torch.tensor([len(rows) for rows in rows_of.values()])
        self.group_starts = self.group_sizes.cumsum(0) - self.group_sizes
        self.group_rows = torch.tensor([row for rows in rows_of.values() for row in rows])

    def __len__(self) -> int:
        return len(self.texts)

    def described(self) -> list[dict]:
        """The texts, each with the named colour of its picture, or "" where none is dominant."""
        colours = map(colour_of, self.pixels.permute(0, 2, 3, 1).numpy())
        return [text | {"colour": colour} for text, colour in zip(self.texts, colours, strict=True)]

    def draw(self, groups: torch.Tensor) -> torch.Tensor:
        """One random row of each group."""
        offsets = (torch.rand(len(groups)) * self.group_sizes[groups]).long()
        return self.group_rows[self.group_starts[groups] + offsets]

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        return self.pixels[rows].float() / 255


def load_pictures(data: str) -> dict[str, EmojiPictures]:
    return {name: EmojiPictures(split) for name, split in load_emoji(data).items()}


class GroupNumbers(torch.utils.data.Dataset):
    """The trainer's data set: numbers only, because pictures are gathered and augmented as whole batches."""

    def __init__(self, num_groups: int):
        self.num_groups = num_groups

    def __len__(self) -> int:
        return self.num_groups

    def __getitem__(self, group: int) -> dict[str, int]:
        return {"group": group}


class EmojiTrainer(ResumableTrainerMixin):
    """Draws pictures of each batch's groups, and logs every number that the model returns beside its loss.

    All randomness is drawn in `compute_loss`, never in the data loader, which works ahead: so a resumed run equals one
    that was never stopped.
    """

    def __init__(self, *, pictures: EmojiPictures, **kwargs):
        super().__init__(train_dataset=GroupNumbers(len(pictures.group_sizes)), **kwargs)
        self.pictures = pictures
        self._sums: dict[str, torch.Tensor] = {}
        self._num_sums = 0

    @abstractmethod
    def make_batch(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """The model's inputs for these rows of the pictures."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = self.make_batch(self.pictures.draw(inputs["group"].cpu()))
        outputs = model(**{name: value.to(self.args.device) for name, value in batch.items()})
        for name, value in outputs.items():
            if name != "loss":
                self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._num_sums += 1
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs, start_time=None):
        if self._num_sums:
            logs |= {name: round(float(value) / self._num_sums, 5) for name, value in self._sums.items()}
            self._sums, self._num_sums = {}, 0
        super().log(logs, start_time)


def run_stage(trainer: ResumableTrainerMixin, out: str, save: Callable[[str], dict]) -> None:
    """Trains to the end (resuming where there is a checkpoint) and writes `out`.

    `save(folder)` writes the trained part into `folder` and returns what was measured, which is kept in
    `training.json` with the losses of every logging step.
    """
    result = trainer.train(resume_from_checkpoint=True)
    if not trainer.is_world_process_zero():
        return
    partial = f"{out}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    trainer.model.eval()
    measured = save(partial)
    record = {"steps": result.global_step, "measured": measured, "log": trainer.state.log_history}
    Path(partial, "training.json").write_text(json.dumps(record, indent=1))
    os.replace(partial, out)
    print(json.dumps(measured, indent=1))


# Augmentation. Nothing is mirrored: letters, flags and "facing right" would become false.


def uniform(count: int, low: float, high: float) -> torch.Tensor:
    return torch.empty(count).uniform_(low, high)


def place(pixels: torch.Tensor, size: torch.Tensor, center: torch.Tensor, canvas: int) -> torch.Tensor:
    """Pictures drawn on a white square of `canvas` pixels.

    Args:
        pixels: (B, 3, h, w) in [0, 1].
        size: (B,) side of the picture as a part of the canvas.
        center: (B, 2) x, y of the picture's centre; -1 and 1 are the edges of the canvas.
    """
    theta = torch.zeros(len(pixels), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / size
    theta[:, :, 2] = -center / size[:, None]
    grid = F.affine_grid(theta, [len(pixels), 3, canvas, canvas], align_corners=False)
    return 1 - F.grid_sample(1 - pixels, grid, align_corners=False)


def jitter(pixels: torch.Tensor, probability: float = 0.5) -> torch.Tensor:
    """Small shifts and scalings of a part of the pictures; the others stay as sharp as they were drawn."""
    count = len(pixels)
    center = torch.stack([uniform(count, -0.12, 0.12), uniform(count, -0.12, 0.12)], dim=1)
    moved = place(pixels, uniform(count, 0.75, 1.05), center, pixels.shape[-1])
    return torch.where((torch.rand(count) < probability)[:, None, None, None], moved, pixels)


def compose_pairs(pixels: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
    """Scenes of two: item i holds picture i and picture i + 1, right of it where `beside` (B,) is true, else below."""
    count = len(pixels)
    small = F.avg_pool2d(pixels, 2)
    scenes = []
    for side, part in ((-0.5, small), (0.5, small.roll(-1, dims=0))):
        along, across = side + uniform(count, -0.05, 0.05), uniform(count, -0.35, 0.35)
        x_y = torch.stack([along, across], dim=1)
        center = torch.where(beside[:, None], x_y, x_y.flip(1))
        scenes.append(place(part, uniform(count, 0.38, 0.5), center, pixels.shape[-1]))
    return torch.minimum(*scenes)


def recolour(pixels: torch.Tensor, colouring: torch.Tensor) -> torch.Tensor:
    """`colouring` (B,) indexes COLOURINGS: as it is, grey, or inverted (which puts it on black)."""
    colouring = colouring[:, None, None, None]
    grey = pixels.mean(dim=1, keepdim=True).expand_as(pixels)
    return torch.where(colouring == 1, grey, torch.where(colouring == 2, 1 - pixels, pixels))


def draw_colouring(count: int) -> torch.Tensor:
    return torch.multinomial(torch.tensor(COLOURING_WEIGHTS), count, replacement=True)


# Measures


def psnr(pixels: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(B,) peak signal-to-noise ratio in dB of pictures in [0, 1]."""
    return -10 * (pixels - reference).square().flatten(1).mean(dim=1).clamp_min(1e-10).log10()


def psnr_where(pixels: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B,) PSNR over the pixels where `mask` (B, 1, H, W) is true."""
    squared = (pixels - reference).square().mean(dim=1, keepdim=True) * mask
    return -10 * (squared.flatten(1).sum(1) / mask.flatten(1).sum(1).clamp_min(1)).clamp_min(1e-10).log10()


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
