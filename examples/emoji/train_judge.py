"""Train the judge that scores what the small model draws, apart from that model and on training pictures only:

    python examples/emoji/train_judge.py --data data/emoji --out runs/emoji/judge

Its accuracy on real pictures of unseen (concept, style) pairs is the ceiling of every score that it gives; it is in
`training.json`. On a CPU it looks at half the resolution, so that it learns enough in ten minutes.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
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
    uniform,
)
from emoji_words import caption as plain_caption
from judge import HEADS, UNKNOWN, Judge, accuracies
from torchvision.transforms.functional import gaussian_blur
from train_encoder import build_tokenizer, caption, scene_caption, tokenize

COMMON = dict(lr_scheduler_type="cosine", weight_decay=0.05, learning_rate=3e-3)
PRESETS = {
    "cpu": dict(
        max_steps=3000,
        per_device_train_batch_size=64,
        warmup_steps=200,
        save_steps=300,
        **COMMON,
    ),
    "gpu": dict(
        size=64,
        width=64,
        depth=2,
        max_steps=8000,
        per_device_train_batch_size=512,
        warmup_steps=500,
        save_steps=1000,
        **COMMON,
    ),
}
SCENE_FRACTION = 0.125
MOVED, BLURRED, MAX_BLUR = 0.75, 0.4, 1.0  # parts of the pictures; the largest deviation of the blur, in pixels


@dataclass
class JudgeArguments:
    size: int = field(default=32, metadata={"help": "side in pixels of what it looks at"})
    width: int = field(default=32, metadata={"help": "channels of the first stage"})
    depth: int = field(default=1, metadata={"help": "blocks of a stage"})


def head_classes(texts: list[dict]) -> dict[str, list[str]]:
    return {head: sorted({text[column] for text in texts}) for head, column in HEADS.items()}


def soften(pixels: torch.Tensor) -> torch.Tensor:
    """Blurs a part of the pictures a little, as decoders do."""
    sigma = uniform(1, 0.3, MAX_BLUR).item()
    blurred = gaussian_blur(pixels, kernel_size=5, sigma=sigma)
    return torch.where((torch.rand(len(pixels)) < BLURRED)[:, None, None, None], blurred, pixels)


class JudgeTrainer(EmojiTrainer):
    def make_batch(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        pixels, texts = self.pictures[rows], [self.pictures.texts[row] for row in rows.tolist()]
        scenes = int(len(rows) * SCENE_FRACTION)
        beside = torch.rand(scenes) < 0.5
        neighbours = texts[1:scenes] + texts[:1]
        captions = [
            scene_caption(first, second, is_beside)
            for first, second, is_beside in zip(texts[:scenes], neighbours, beside.tolist(), strict=False)
        ] + [caption(text) for text in texts[scenes:]]
        colouring = draw_colouring(len(rows))
        captions = [text + COLOURINGS[kind] for text, kind in zip(captions, colouring.tolist(), strict=True)]
        pixels = torch.cat([compose_pairs(pixels[:scenes], beside), jitter(pixels[scenes:], MOVED)])
        labels = self.model.labels(texts)
        labels[:scenes] = UNKNOWN
        pixels = soften(recolour(pixels, colouring))
        return {"pixels": pixels, "labels": labels, **tokenize(self.model.tokenizer, captions)}


def ceiling(judge: Judge, pictures: EmojiPictures) -> dict[str, float]:
    """How well it does on real pictures: accuracies, and cosines with their captions and with another's."""
    look = judge.look(pictures[torch.arange(len(pictures))])
    texts = judge.read([plain_caption(text) for text in pictures.texts])
    cosines = look.embeddings @ texts.T
    own = cosines.diagonal()
    others = (cosines.sum(1) - own) / max(1, len(cosines) - 1)
    return {
        "pictures": len(pictures),
        **accuracies(look, judge.labels(pictures.texts)),
        "similarity_to_text": own.mean().item(),
        "similarity_to_other_texts": others.mean().item(),
    }


def save(judge: Judge, pictures: dict[str, EmojiPictures], folder: str) -> dict:
    judge.save(folder)
    held_out = {name: ceiling(judge, pictures[name]) for name in ("heldout_pair", "heldout_concept")}
    return {"parameters": count_parameters(judge), "concepts": len(judge.classes["concept"]), **held_out}


def main(argv: list[str] | None = None) -> None:
    stage, training, options = parse_arguments("judge", PRESETS, argv, extra=JudgeArguments)
    if Path(stage.out).exists():
        print(f"{stage.out} is trained already")
        return
    torch.manual_seed(training.seed)
    pictures = load_pictures(stage.data)
    texts = pictures["train"].texts
    judge = Judge(head_classes(texts), build_tokenizer(texts), options.size, options.width, options.depth)
    trainer = JudgeTrainer(model=judge, args=training, pictures=pictures["train"])
    run_stage(trainer, stage.out, lambda folder: save(judge, pictures, folder))


if __name__ == "__main__":
    main()
