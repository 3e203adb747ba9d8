"""The parts of the loss over many batches, for the logs."""

import torch
from accelerate import Accelerator


class LossParts:
    """Sums over batches, and the weights to divide them by, (2 + num_scales,) each: of the text loss, of the image
    loss, and of the squared error of each scale."""

    def __init__(self, num_scales: int):
        self.sums, self.weights = torch.zeros(2 + num_scales), torch.zeros(2 + num_scales)

    @property
    def is_empty(self) -> bool:
        return not self.weights.any()

    def add(self, sums: torch.Tensor, weights: torch.Tensor) -> None:
        self.sums, self.weights = self.sums.to(sums.device) + sums, self.weights.to(weights.device) + weights

    def clear(self) -> None:
        self.sums.zero_()
        self.weights.zero_()

    def averaged(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over what all processes have added, by their names in the logs; none where nothing was supervised."""
        both = torch.stack([self.sums, self.weights]).to(accelerator.device)
        sums, weights = accelerator.reduce(both, reduction="sum")
        if not weights.any():
            return {}
        text_loss, image_loss, *errors = (sums / weights.clamp(min=1)).tolist()
        scales = enumerate(zip(errors, weights[2:].tolist(), strict=True))
        logs = {"text_loss": text_loss, "image_loss": image_loss}
        return logs | {f"mse_scale_{scale}": error for scale, (error, count) in scales if count}
