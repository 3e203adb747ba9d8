"""A start for the projector and the image head that suits the encoder."""

import torch

from ..image_head_puma import PumaFlowHead
from ..modeling_puma import PumaForConditionalGeneration


@torch.no_grad()
def standardize_feature_heads(model: PumaForConditionalGeneration, mean: torch.Tensor, std: torch.Tensor):
    """Folds the encoder's statistics into a freshly initialised projector and image head, in place.

    The projector then starts as if it read standardised features, and the head as if it wrote them: an encoder's
    channels differ in scale by orders of magnitude, and nothing else in the sequence normalises them.

    Args:
        mean, std: (C,) per channel of the encoder's features.
    """
    projector, head = model.model.projector, model.image_head
    projector.bias -= projector.weight @ (mean / std).to(projector.weight)
    projector.weight /= std.to(projector.weight)
    if isinstance(head, PumaFlowHead):
        head.mean.copy_(mean)
        head.std.copy_(std)
        return
    head.weight *= std.to(head.weight)[:, None]
    head.bias.mul_(std.to(head.weight)).add_(mean.to(head.weight))
