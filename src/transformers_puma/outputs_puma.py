"""What PUMA's models return.

Legend: B rows, T positions, n images, S tokens of an image, C feature channels, H hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .image_positions_puma import ImagePositions


@dataclass
class PumaModelOutputWithPast(BaseModelOutputWithPast):
    """`last_hidden_state` (B, T, H) and the images of the sequence.

    image_features: (n, S, C) encoder features, coarsest scale first; None without images.
    image_positions: where they stand, see `ImagePositions`.
    """

    image_features: torch.Tensor | None = None
    image_positions: ImagePositions | None = None


@dataclass
class PumaCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of `PumaForConditionalGeneration`.

    loss: weighted sum of `text_loss` and `image_loss`; all three None without labels.
    scale_losses: (num_scales,) unweighted squared error per scale (of features, or of velocities with a flow head)
        over this batch's supervised image tokens, NaN where a scale has none; detached, for logging.
    logits: (B, T, V); None where `skip_logits` was asked for.
    image_features: (n, S, C) encoder features of the images.
    predicted_features: (n, S, C) the same with the supervised ones replaced by what the regression head predicts,
        detached; None without labels or images, and with a flow head.
    """

    text_loss: torch.Tensor | None = None
    image_loss: torch.Tensor | None = None
    scale_losses: torch.Tensor | None = None
    image_features: torch.Tensor | None = None
    predicted_features: torch.Tensor | None = None
