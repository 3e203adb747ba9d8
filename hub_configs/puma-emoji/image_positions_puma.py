"""Where images stand in a batch of sequences, and what follows from it for embeddings and attention. Knows no model.

Legend: B rows, T positions, n images (in the order of their placeholders, row by row), C feature channels, H hidden
size, S tokens of an image, coarsest scale first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from .cache_name_puma import CACHE
from .granularity import scale_of_position


@dataclass
class ImagePositions:
    """Where images stand in a batch of sequences; each (B, T).

    mask: True at image placeholders.
    image: index of the image in the whole batch.
    offset: position within the image, 0 at its coarsest token.
    """

    mask: torch.Tensor
    image: torch.Tensor
    offset: torch.Tensor

    @classmethod
    def find(cls, input_ids: torch.Tensor, image_token_id: int) -> "ImagePositions":
        """An image is a run of placeholders; the last one of a row may be cut short."""
        mask = input_ids == image_token_id
        first = mask.clone()
        first[:, 1:] &= ~mask[:, :-1]
        image = first.flatten().cumsum(0).view_as(input_ids) - 1
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        offset = positions - torch.where(first, positions, 0).cummax(dim=1).values
        return cls(mask, image, offset)

    def to(self, device: torch.device) -> "ImagePositions":
        return ImagePositions(self.mask.to(device), self.image.to(device), self.offset.to(device))

    def of_images(self, flags: torch.Tensor | None) -> torch.Tensor:
        """(B, T) bool: positions of the images whose flag (n,) is set; none without flags."""
        if flags is None or not len(flags):
            return torch.zeros_like(self.mask)
        return self.mask & flags.to(self.mask.device, torch.bool)[self.image.clamp(min=0)]

    @property
    def starts(self) -> torch.Tensor:
        """(B, T) bool: the first placeholder of each image."""
        return self.mask & (self.offset == 0)

    def counts(self) -> list[int]:
        """How many images each row holds."""
        return self.starts.sum(dim=1).tolist()

    def scales(self, tokens_per_scale: Sequence[int]) -> torch.Tensor:
        """(B, T) long: the scale of each image position; without meaning at text."""
        scales = scale_of_position(tokens_per_scale).to(self.offset.device)
        return scales[self.offset.clamp(max=len(scales) - 1)]  # text may go on for longer than an image

    def scale_blocks(self, tokens_per_scale: Sequence[int]) -> torch.Tensor:
        """(B, T) long: one number for each scale of each image, -1 at text."""
        block = self.image * len(tokens_per_scale) + self.scales(tokens_per_scale)
        return torch.where(self.mask, block, -1)


def blockwise_causal_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    position_ids: torch.LongTensor | None,
    blocks: torch.Tensor,
) -> torch.Tensor:
    """The causal mask of transformers in which positions of one block see each other as well.

    Args:
        config: of the language model.
        attention_mask: (B, T with cache), what is no padding.
        position_ids: (B, T); without mask and cache, where they start anew a packed row begins that sees no other.
        blocks: (B, T) long; -1 is no block.

    Raises:
        ValueError: an attention implementation, or a mask, that has no room for blocks.
    """
    if "flash" in config._attn_implementation:
        raise ValueError(
            f"attn_implementation={config._attn_implementation!r} cannot do image_decoding='next_scale', whose mask "
            "is not causal: use 'sdpa', 'flex_attention' or 'eager'"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has {attention_mask.dim()} dimensions: image_decoding='next_scale' makes its own mask "
            "from one of (B, T), and works with no static cache"
        )
    past = cache.get_seq_length() if cache is not None else 0
    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        block_sequence_ids=F.pad(blocks, (past, 0), value=-1).to(inputs_embeds.device),
        **{CACHE: cache},
    )


def splice(
    inputs_embeds: torch.Tensor, states: torch.Tensor, positions: ImagePositions, read: torch.Tensor
) -> torch.Tensor:
    """Image states (n, S, H) in place of the embeddings (B, T, H) where `read` (B, T) holds; static shapes
    throughout."""
    flat = (positions.image * states.shape[1] + positions.offset).clamp(0, states.shape[0] * states.shape[1] - 1)
    # Ids, states and embeddings may each be on a device of their own.
    gathered = states.flatten(0, 1)[flat.to(states.device)].to(inputs_embeds.device, inputs_embeds.dtype)
    return torch.where(read.unsqueeze(-1).to(inputs_embeds.device), gathered, inputs_embeds)


def with_noise(features: torch.Tensor, feature_noise: float, num_tokens: int) -> torch.Tensor:
    """The first tokens (n, num_tokens, C) of features (n, S, C) with white noise of a strength drawn for each image,
    up to `feature_noise` deviations of the channel over all S."""
    deviation = features.std(dim=(0, 1), keepdim=True)
    shown = features[:, :num_tokens]
    strength = feature_noise * torch.rand(features.shape[0], 1, 1, device=features.device, dtype=features.dtype)
    return shown + strength * deviation * torch.randn_like(shown)
