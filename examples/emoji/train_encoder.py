"""Train the image encoder: a CLIP vision tower whose patch features hold both meaning and local detail.

    python examples/emoji/train_encoder.py --data data/emoji --out runs/emoji/encoder

Three losses on the patch features (no class token, no post-layernorm: what the language model and the decoders read):
  contrastive  open_clip's loss between captions and the mean patch feature, which is the coarsest scale;
  pixels       a small head for each scale regresses the pixels under each of its tokens, else local detail is lost;
  statistics   each channel is drawn to zero mean and unit variance, because other models regress these features.
The first steps see half the resolution (an 8 x 8 grid, position embeddings interpolated): three times more pictures a
second.
Only the vision tower is saved; the text tower and the heads stay in the checkpoints.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from emoji_training import (
    COLOURINGS,
    EmojiPictures,
    EmojiTrainer,
    compose_pairs,
    count_parameters,
    draw_colouring,
    jitter,
    load_pictures,
    parse_arguments,
    recolour,
    run_stage,
)
from open_clip.loss import ClipLoss
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
)

from transformers_puma.granularity import multigranular_features
from transformers_puma.image_processing_puma import PumaImageProcessor

PRESETS = {
    "cpu": dict(
        max_steps=1250,
        low_resolution_steps=900,
        per_device_train_batch_size=96,
        learning_rate=1e-3,
        warmup_steps=100,
        lr_scheduler_type="cosine",
        weight_decay=0.05,
        save_steps=150,
    ),
    "gpu": dict(
        max_steps=12000,
        low_resolution_steps=2000,
        per_device_train_batch_size=1024,
        learning_rate=1e-3,
        warmup_steps=500,
        lr_scheduler_type="cosine",
        weight_decay=0.05,
        save_steps=1000,
    ),
}
NUM_SCALES = 5
SCENE_FRACTION = 0.25
PIXEL_WEIGHT, STATISTICS_WEIGHT = 1.0, 0.5
MAX_TOKEN_PIXELS = 8  # a head sees what lies under its token shrunk to at most 8 x 8
TEMPLATES = (
    "{name}",
    "{name}, {style}",
    "{style} emoji: {name}",
    "{name} in {style} style, {tags}",
    "{tags}, {style}",
)


@dataclass
class EncoderArguments:
    low_resolution_steps: int = field(default=0, metadata={"help": "steps at half resolution, which come first"})


def build_vision(width: int = 128, layers: int = 4, heads: int = 2, size: int = 64) -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=size,
        patch_size=4,
        hidden_act="gelu",
        projection_dim=width,
    )
    vision = CLIPVisionModel(config)
    vision.post_layernorm.requires_grad_(False)  # features are taken before it
    return vision


def build_tokenizer(texts: list[dict], vocabulary: int = 2048) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<start>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [" ".join([text["name"], text["style"], *text["tags"]]) for text in texts]
    tokenizer.train_from_iterator(words + list(COLOURINGS), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", eos_token="<end>", model_max_length=48
    )


def build_text(tokenizer: PreTrainedTokenizerFast, width: int = 128, layers: int = 2) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_act="gelu",
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModelWithProjection(config)


def caption(text: dict) -> str:
    """A random template, with up to three random tags; a name stands in where a picture has no tags."""
    template = TEMPLATES[torch.randint(len(TEMPLATES), ()).item()]
    tags = [text["tags"][i] for i in torch.randperm(len(text["tags"]))[:3]] or [text["name"]]
    return template.format(name=text["name"], style=text["style"], tags=", ".join(tags))


def scene_caption(first: dict, second: dict, beside: bool) -> str:
    relation = "to the left of" if beside else "above"
    return f"{first['name']} {relation} {second['name']}, {second['style']}"


def token_pixels(pixels: torch.Tensor, grid: int) -> torch.Tensor:
    """What lies under each token of a scale of `grid` x `grid`: (B, grid ** 2, 3 * side ** 2), side <= 8."""
    covered = pixels.shape[-1] // grid
    side = min(covered, MAX_TOKEN_PIXELS)
    return F.pixel_unshuffle(F.avg_pool2d(pixels, covered // side), side).flatten(2).transpose(1, 2)


class EncoderTask(nn.Module):
    """The vision tower with its three losses; `text` and the heads serve training only."""

    def __init__(self, vision: CLIPVisionModel, text: CLIPTextModelWithProjection, num_scales: int = NUM_SCALES):
        super().__init__()
        self.vision, self.text = vision, text
        width, patch = vision.config.hidden_size, vision.config.patch_size
        self.visual_projection = nn.Linear(width, text.config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.pixel_heads = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, 2 * width),
                nn.GELU(),
                nn.Linear(2 * width, 3 * min(patch * 2**scale, MAX_TOKEN_PIXELS) ** 2),
            )
            for scale in range(num_scales)
        )
        self.contrastive = ClipLoss()
        processor = PumaImageProcessor()
        self.register_buffer("mean", torch.tensor(processor.image_mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(processor.image_std)[:, None, None], persistent=False)

    def encode(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, H, H) in [0, 1] -> features, item i (B, k_i, C); fewer scales where the grid is too small for all."""
        hidden = self.vision((pixels - self.mean) / self.std, interpolate_pos_encoding=True).last_hidden_state
        features = hidden[:, 1:].float()
        grid = pixels.shape[-1] // self.vision.config.patch_size
        return multigranular_features(features, min(len(self.pixel_heads), grid.bit_length()))

    def pixel_errors(self, features: list[torch.Tensor], pixels: torch.Tensor) -> list[torch.Tensor]:
        """Per scale, predicted minus true pixels under each token, in [-1, 1]."""
        grids = [math.isqrt(scale.shape[1]) for scale in features]
        return [
            head(scale).float() - token_pixels(2 * pixels - 1, grid)
            for head, scale, grid in zip(self.pixel_heads, features, grids, strict=False)
        ]

    def embed_images(self, coarsest: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.visual_projection(coarsest.mean(dim=1)).float(), dim=-1)

    def embed_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.text(input_ids, attention_mask=attention_mask).text_embeds.float(), dim=-1)

    def forward(self, pixels: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict:
        features = self.encode(pixels)
        image_embeds, text_embeds = self.embed_images(features[-1]), self.embed_texts(input_ids, attention_mask)
        contrastive = self.contrastive(image_embeds, text_embeds, self.logit_scale.clamp(max=math.log(100)).exp())
        pixel = sum(error.abs().mean() + error.square().mean() for error in self.pixel_errors(features, pixels))
        channels = features[0].flatten(0, 1)
        statistics = channels.mean(dim=0).square().mean() + (channels.std(dim=0) - 1).square().mean()
        found = (image_embeds @ text_embeds.T).argmax(dim=1)
        return {
            "loss": contrastive + PIXEL_WEIGHT * pixel + STATISTICS_WEIGHT * statistics,
            "contrastive": contrastive,
            "pixels": pixel,
            "statistics": statistics,
            "top1": (found == torch.arange(len(found), device=found.device)).float().mean(),
        }


class EncoderTrainer(EmojiTrainer):
    def __init__(self, *, tokenizer: PreTrainedTokenizerFast, low_resolution_steps: int, **kwargs):
        super().__init__(**kwargs)
        self.tokenizer = tokenizer
        self.low_resolution_steps = low_resolution_steps

    def make_batch(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        pixels, texts = self.pictures[rows], [self.pictures.texts[row] for row in rows.tolist()]
        scenes = int(len(rows) * SCENE_FRACTION)
        beside = torch.rand(scenes) < 0.5
        captions = [
            scene_caption(first, second, is_beside)
            for first, second, is_beside in zip(
                texts[:scenes], texts[1:scenes] + texts[:1], beside.tolist(), strict=True
            )
        ] + [caption(text) for text in texts[scenes:]]
        colouring = draw_colouring(len(rows))
        captions = [text + COLOURINGS[kind] for text, kind in zip(captions, colouring.tolist(), strict=True)]
        pixels = recolour(torch.cat([compose_pairs(pixels[:scenes], beside), jitter(pixels[scenes:])]), colouring)
        if self.state.global_step < self.low_resolution_steps:
            pixels = F.avg_pool2d(pixels, 2)
        return {"pixels": pixels, **tokenize(self.tokenizer, captions)}


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> dict[str, torch.Tensor]:
    encoded = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


@torch.no_grad()
def pixel_psnr(task: EncoderTask, pictures: EmojiPictures) -> list[float]:
    """Per scale, mean PSNR in dB of the pixel heads against the pictures (shrunk as the heads see them)."""
    errors = []
    for rows in torch.arange(len(pictures)).split(64):
        pixels = pictures[rows].to(task.mean.device)
        squares = [(error / 2).square().flatten(1).mean(1) for error in task.pixel_errors(task.encode(pixels), pixels)]
        errors.append(torch.stack(squares, dim=1))
    return (-10 * torch.cat(errors).clamp_min(1e-10).log10()).mean(dim=0).tolist()


@torch.no_grad()
def retrieval_top1(
    task: EncoderTask, tokenizer: PreTrainedTokenizerFast, pictures: EmojiPictures, batch_size: int = 96
) -> float:
    """How often a picture's own "name, style" is the nearest of a random batch's; chance is 1 / `batch_size`."""
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
    hits = []
    for rows in order.split(batch_size):
        texts = [pictures.texts[row] for row in rows.tolist()]
        words = tokenize(tokenizer, [f"{text['name']}, {text['style']}" for text in texts])
        device = task.mean.device
        text_embeds = task.embed_texts(**{name: value.to(device) for name, value in words.items()})
        similarity = task.embed_images(task.encode(pictures[rows].to(device))[-1]) @ text_embeds.T
        hits.append(similarity.argmax(dim=1).cpu() == torch.arange(len(rows)))
    return torch.cat(hits).float().mean().item()


@torch.no_grad()
def feature_statistics(task: EncoderTask, pictures: EmojiPictures) -> dict[str, float]:
    """Over channels of scale 0: the largest absolute mean, the smallest and the largest standard deviation."""
    rows = torch.arange(0, len(pictures), max(1, len(pictures) // 256))
    channels = task.encode(pictures[rows].to(task.mean.device))[0].flatten(0, 1)
    std = channels.std(dim=0)
    return {
        "max_abs_mean": channels.mean(dim=0).abs().max().item(),
        "min_std": std.min().item(),
        "max_std": std.max().item(),
    }


def save(
    task: EncoderTask, tokenizer: PreTrainedTokenizerFast, pictures: dict[str, EmojiPictures], folder: str
) -> dict:
    task.vision.save_pretrained(folder)
    side = task.vision.config.image_size
    PumaImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    return {
        "parameters": count_parameters(task.vision),
        "retrieval_top1_of_96": {
            name: retrieval_top1(task, tokenizer, pictures[name]) for name in ("heldout_pair", "heldout_concept")
        },
        "pixel_psnr_per_scale": {
            name: pixel_psnr(task, pictures[name]) for name in ("heldout_concept", "heldout_pair")
        },
        "features": feature_statistics(task, pictures["heldout_concept"]),
    }


def main(argv: list[str] | None = None) -> None:
    stage, training, encoder = parse_arguments("encoder", PRESETS, argv, extra=EncoderArguments)
    if Path(stage.out).exists():
        print(f"{stage.out} is trained already")
        return
    torch.manual_seed(training.seed)
    pictures = load_pictures(stage.data)
    tokenizer = build_tokenizer(pictures["train"].texts)
    task = EncoderTask(build_vision(), build_text(tokenizer))
    trainer = EncoderTrainer(
        model=task,
        args=training,
        pictures=pictures["train"],
        tokenizer=tokenizer,
        low_resolution_steps=encoder.low_resolution_steps,
    )
    run_stage(trainer, stage.out, lambda folder: save(task, tokenizer, pictures, folder))


if __name__ == "__main__":
    main()
