"""The judge of the small model: a network that never met it says what a picture shows and how well it fits a text.

Scoring a model with its own encoder is circular: there, drawn pictures score above true ones. The judge is a ResNet
of its own with a head for each of HEADS (a classifier) and a text tower (CLIP-style similarities).

Legend: B pictures in a batch, n pictures in all, D width of the embeddings; pixels are (n, 3, 64, 64) in [0, 1].
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from safetensors.torch import load_file, save_file
from torch import nn
from train_encoder import build_text, tokenize
from transformers import PreTrainedTokenizerFast, ResNetConfig, ResNetModel

HEADS = {"concept": "base", "style": "style", "tone": "tone", "gender": "gender"}  # head -> column of the data
UNKNOWN = -100  # the label of what a head has no class for; cross entropy skips it
LABEL_SMOOTHING = 0.1
BATCH = 128


@dataclass
class Look:
    """What the judge sees in n pictures: `embeddings` (n, D) of length 1, and each head's `logits` (n, classes)."""

    embeddings: torch.Tensor
    logits: dict[str, torch.Tensor]


class Judge(nn.Module):
    """A ResNet that keeps half the resolution after its stem (64 pixels are few), its heads and a text tower.

    Args:
        classes: for each of HEADS the values of its column, in the order of the logits.
        size: side in pixels of what it looks at; pictures are shrunk to it.
        width: channels of the first stage; each of the three next ones has twice as many.
        depth: blocks of a stage.
    """

    def __init__(
        self, classes: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast, size: int, width: int, depth: int
    ):
        super().__init__()
        self.classes, self.tokenizer, self.shape = classes, tokenizer, {"size": size, "width": width, "depth": depth}
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.vision = ResNetModel(
            ResNetConfig(embedding_size=width, hidden_sizes=widths, depths=[depth] * 4, layer_type="basic")
        )
        self.vision.embedder.pooler = nn.Identity()
        self.text = build_text(tokenizer, layers=1)
        self.heads = nn.ModuleDict({head: nn.Linear(widths[-1], len(values)) for head, values in classes.items()})
        self.visual_projection = nn.Linear(widths[-1], self.text.config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.contrastive = ClipLoss()

    def embed_pictures(self, pixels: torch.Tensor) -> Look:
        pixels = F.adaptive_avg_pool2d(pixels, self.shape["size"])
        pooled = self.vision(1 - 2 * pixels.contiguous(memory_format=torch.channels_last)).pooler_output.flatten(1)
        embeddings = F.normalize(self.visual_projection(pooled).float(), dim=-1)
        return Look(embeddings, {head: layer(pooled).float() for head, layer in self.heads.items()})

    def embed_tokens(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.text(input_ids, attention_mask=attention_mask).text_embeds.float(), dim=-1)

    def forward(
        self, pixels: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`labels` (B, number of heads) in the order of HEADS, UNKNOWN where a head has nothing to say."""
        look = self.embed_pictures(pixels)
        texts = self.embed_tokens(input_ids, attention_mask)
        losses = {
            head: F.cross_entropy(logits, labels[:, i], ignore_index=UNKNOWN, label_smoothing=LABEL_SMOOTHING)
            for i, (head, logits) in enumerate(look.logits.items())
        }
        losses["contrastive"] = self.contrastive(
            look.embeddings, texts, self.logit_scale.clamp(max=math.log(100)).exp()
        )
        return {"loss": sum(losses.values()), **losses}

    def labels(self, texts: Sequence[dict]) -> torch.Tensor:
        """(n, number of heads) classes of pictures with these texts."""
        index = {head: {value: i for i, value in enumerate(values)} for head, values in self.classes.items()}
        return torch.tensor([[index[head].get(text[HEADS[head]], UNKNOWN) for head in HEADS] for text in texts])

    @torch.no_grad()
    def look(self, pixels: torch.Tensor) -> Look:
        """Any number of pictures, in float32."""
        parts = [self.embed_pictures(part) for part in pixels.to(self.logit_scale.device).split(BATCH)]
        embeddings = torch.cat([part.embeddings for part in parts]).cpu()
        return Look(embeddings, {head: torch.cat([part.logits[head] for part in parts]).cpu() for head in HEADS})

    @torch.no_grad()
    def read(self, captions: Sequence[str]) -> torch.Tensor:
        """(n, D) embeddings of texts."""
        parts = [captions[start : start + BATCH] for start in range(0, len(captions), BATCH)]
        words = [tokenize(self.tokenizer, list(part)) for part in parts]
        device = self.logit_scale.device
        return torch.cat([self.embed_tokens(**{k: v.to(device) for k, v in w.items()}) for w in words]).cpu()

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        described = {"classes": self.classes, **self.shape}
        Path(folder, "judge.json").write_text(json.dumps(described))
        self.tokenizer.save_pretrained(folder)
        save_file(
            {name: tensor.contiguous() for name, tensor in self.state_dict().items()},
            Path(folder, "model.safetensors"),
        )

    @classmethod
    def load(cls, folder: str | Path) -> "Judge":
        """The judge that train_judge.py wrote, in evaluation mode.

        Raises:
            FileNotFoundError: there is none; the message holds the command that trains it.
        """
        if not Path(folder, "judge.json").exists():
            raise FileNotFoundError(
                f"no judge at {folder}; train it with: python examples/emoji/train_judge.py --out {folder}"
            )
        described = json.loads(Path(folder, "judge.json").read_text())
        judge = cls(**described, tokenizer=PreTrainedTokenizerFast.from_pretrained(folder))
        judge.load_state_dict(load_file(Path(folder, "model.safetensors")))
        return judge.eval()


def hits(logits: torch.Tensor, labels: torch.Tensor, k: int = 1) -> torch.Tensor:
    """(m,) 1 where the true class is among the first k, for the m of n pictures whose class is known."""
    known = labels != UNKNOWN
    first = logits[known].topk(min(k, logits.shape[1]), dim=1).indices
    return (first == labels[known, None]).any(dim=1).float()


def accuracies(look: Look, labels: torch.Tensor) -> dict[str, float]:
    """Share of pictures whose class is first (for the concept: or among the first five)."""
    columns = {head: labels[:, i] for i, head in enumerate(HEADS)}
    shares = {"concept_top1": hits(look.logits["concept"], columns["concept"])}
    shares["concept_top5"] = hits(look.logits["concept"], columns["concept"], 5)
    shares |= {head: hits(look.logits[head], columns[head]) for head in HEADS if head != "concept"}
    return {name: share.mean().item() for name, share in shares.items() if len(share)}
