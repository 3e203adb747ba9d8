"""The two parts of PUMA's loss (report equation 2). Pure functions, shared by training and evaluation."""

import torch
import torch.nn.functional as F


def is_supervised_text(labels: torch.Tensor, image_token_id: int) -> torch.Tensor:
    """(B, T - 1) bool: which labels (B, T) after the first are text that is learnt; an image has its own loss."""
    return (labels[:, 1:] != -100) & (labels[:, 1:] != image_token_id)


def text_loss(
    logits: torch.Tensor, targets: torch.Tensor, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross entropy of next-token prediction, averaged over supervised text tokens.

    Args:
        logits: (n, V) of the n supervised text tokens, each from the state before it.
        targets: (n,) token ids.
        num_items: supervised tokens of the global batch; by default n.
    """
    total = F.cross_entropy(logits.float(), targets.to(logits.device), reduction="sum")
    return total / _count(num_items, len(targets), total.device)


def image_loss(
    predicted: torch.Tensor,
    target: torch.Tensor,
    scales: torch.Tensor,
    scale_weights: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Squared error of features, weighted per scale and averaged over supervised image tokens.

    Args:
        predicted, target: (n, C) features of the n supervised image tokens.
        scales: (n,) the scale of each token.
        scale_weights: (num_scales,) alpha of each scale.
        num_items: supervised image tokens of the global batch; by default n.
    """
    weighted = scale_weights[scales] * squared_error(predicted, target)
    return weighted.sum() / _count(num_items, len(scales), weighted.device)


def squared_error(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(n,) squared error of each token, averaged over channels, in fp32."""
    return (predicted.float() - target.float()).square().mean(-1)


def _count(num_items: torch.Tensor | int | None, counted: int, device: torch.device) -> torch.Tensor:
    """The denominator; at least 1, so that a batch without supervised tokens of a kind gives an exact zero."""
    return torch.as_tensor(counted if num_items is None else num_items, device=device).clamp(min=1)
