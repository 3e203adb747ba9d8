"""What the parts of the report share: held-out samples, drawing with a seed for each sample, scores, kept pictures.

Legend: B samples of a batch, k tokens of a scale, C feature channels; pictures are (B, 3, H, W) in [0, 1].
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from emoji_training import EmojiPictures, psnr, psnr_where
from judge import HEADS, Judge, hits
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from diffusers_puma import PumaPipeline
from diffusers_puma.contact_sheet import contact_sheet
from diffusers_puma.evaluation.lpips import load_lpips, lpips_distance
from transformers_puma.evaluation.intervals import bootstrap_mean
from transformers_puma.evaluation.runner import run_samples, sample_seed

BATCH = 32
SHOWN = 10  # samples on a sheet
SETTINGS_FILES = ("config.json", "model_index.json", "scheduler_config.json", "tokenizer.json", "judge.json")
MEAN_OF = 256  # training pictures whose mean feature is taken
Features = dict[int, torch.Tensor]
Scores = dict[str, torch.Tensor]  # metric -> (B,)


@dataclass
class Bench:
    """The model that is measured and what measures it.

    folder: where finished samples are kept, one folder a part.
    settings: what decides all numbers, beside a part's own.
    lpips_weights: of `load_lpips`.
    """

    pipe: PumaPipeline
    judge: Judge | None
    pictures: dict[str, EmojiPictures]
    folder: Path
    settings: dict
    lpips_weights: Path | None = None

    @cached_property
    def lpips(self) -> torch.nn.Module:
        return load_lpips(self.lpips_weights)

    @cached_property
    def lpips_of_places(self) -> torch.nn.Module:
        """LPIPS before it is averaged over a picture: (B, 1, H, W)."""
        network = load_lpips(self.lpips_weights)
        network.spatial = True
        return network

    @cached_property
    def mean_features(self) -> Features:
        """{scale: (1, 1, C)} over training pictures."""
        train = self.pictures["train"]
        rows = torch.tensor(spread(train, MEAN_OF))
        parts = [self.pipe.encode_image(to_pil(train[part])) for part in rows.split(BATCH)]
        return {scale: torch.cat([part[scale] for part in parts]).mean((0, 1), keepdim=True) for scale in parts[0]}

    def run(
        self, part: str, samples: Sequence[dict], measure: Callable[[list[dict]], list[dict]], **own
    ) -> list[dict]:
        """Rows of a part, one for each sample; those of an earlier run are not computed again."""
        settings = {**self.settings, **own}
        return run_samples(samples, measure, self.folder / part, settings=settings, batch_size=BATCH, description=part)

    def keep(self, part: str, sample: dict, **pictures: torch.Tensor) -> None:
        """Keeps the pictures (3, H, W) of the first samples for the part's sheet."""
        if sample["index"] < SHOWN:
            folder = self.folder / part / "pictures"
            folder.mkdir(exist_ok=True)
            for label, picture in pictures.items():
                to_pil_image(picture.clamp(0, 1)).save(folder / f"{sample['index']}-{label}.png")

    def sheet(self, part: str, labels: dict[str, str], titles: Sequence[str] | None, count: int) -> Image.Image:
        """One row for each of `labels` (name of the kept picture -> what the sheet calls it), one column a sample."""
        folder, shown = self.folder / part / "pictures", range(min(count, SHOWN))
        rows = [
            (title, [Image.open(folder / f"{index}-{name}.png") for index in shown]) for name, title in labels.items()
        ]
        return contact_sheet(rows, titles and list(titles)[: len(shown)])


def fingerprint(folder: str | Path) -> str:
    """Of the weights, settings and tables of a folder."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).rglob("*")):
        if file.suffix in (".safetensors", ".arrow") or file.name in SETTINGS_FILES:
            digest.update(f"{file.relative_to(folder)}".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def spread(pictures: EmojiPictures, count: int) -> list[int]:
    """Random rows, one of each concept and style, so that variants of people don't crowd out the rest; those of a
    larger count begin with those of a smaller."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randperm(len(pictures.group_sizes), generator=generator)[:count]
    return pictures.group_rows[pictures.group_starts[groups]].tolist()


def numbered(samples: Sequence[dict]) -> list[dict]:
    return [{"index": index, **sample} for index, sample in enumerate(samples)]


def to_pil(pictures: torch.Tensor) -> list[Image.Image]:
    return [to_pil_image(picture) for picture in pictures]


def to_pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    return torch.stack([pil_to_tensor(image) for image in images]).float() / 255


def generators(samples: Sequence[dict], seed: int) -> list[torch.Generator]:
    """Each sample has its own noise, the same in any batch and on any device."""
    return [torch.Generator().manual_seed(sample_seed(seed, sample["index"])) for sample in samples]


def decode(pipe: PumaPipeline, features: Features, scales: Sequence[int], noise: list[torch.Generator]) -> Features:
    """Pictures of each of `scales`, all from the same noise."""
    drawn = pipe(image_features=features, scale=list(scales), generator=noise, output_type="pt").images
    return {scale: pictures.float().cpu() for scale, pictures in drawn.items()}


def is_drawn(truth: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W) bool: pixels that are not white."""
    return (truth < 1).any(dim=1, keepdim=True)


def distances(bench: Bench, first: torch.Tensor, second: torch.Tensor, mask: torch.Tensor, suffix: str) -> Scores:
    """PSNR (dB) and LPIPS, over all pixels and over those of `mask` (B, 1, H, W)."""
    lpips = lpips_distance(bench.lpips, first, second)
    return {
        f"psnr_{suffix}": psnr(first, second),
        f"lpips_{suffix}": lpips,
        f"psnr_{suffix}_masked": psnr_where(first, second, mask),
        f"lpips_{suffix}_masked": lpips_where(bench, first, second, mask),
    }


@torch.no_grad()
def lpips_where(bench: Bench, first: torch.Tensor, second: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B,) mean of LPIPS over the pixels of `mask` (B, 1, H, W)."""
    places = bench.lpips_of_places(first, second, normalize=True) * mask
    return places.flatten(1).sum(1) / mask.flatten(1).sum(1).clamp_min(1)


def judged(
    judge: Judge, pictures: torch.Tensor, texts: list[dict], captions: list[str], truth: torch.Tensor
) -> Scores:
    """What the judge says of pictures that are to show `captions`, as `truth` does."""
    look, labels = judge.look(pictures), judge.labels(texts)
    columns = {head: labels[:, i] for i, head in enumerate(HEADS)}
    return {
        "similarity_to_text": (look.embeddings * judge.read(captions)).sum(1),
        "similarity_to_picture": (look.embeddings * judge.look(truth).embeddings).sum(1),
        "concept_top1": hits(look.logits["concept"], columns["concept"]),
        "concept_top5": hits(look.logits["concept"], columns["concept"], 5),
        "style": hits(look.logits["style"], columns["style"]),
    }


def per_sample(table: dict[str, Scores]) -> list[dict]:
    """{row: {metric: (B,)}} -> for each sample {"scores": {row: {metric: number}}}, without what is NaN."""
    size = len(next(iter(next(iter(table.values())).values())))
    return [
        {
            "scores": {
                row: {metric: round(values[i].item(), 5) for metric, values in scores.items() if not values[i].isnan()}
                for row, scores in table.items()
            }
        }
        for i in range(size)
    ]


def averages(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """{row: {metric: mean with its 95 % bootstrap interval}}."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for label, scores in row["scores"].items():
            for metric, value in scores.items():
                values.setdefault(label, {}).setdefault(metric, []).append(value)
    return {
        label: {metric: bootstrap_mean(column) for metric, column in scores.items()}
        for label, scores in values.items()
    }
