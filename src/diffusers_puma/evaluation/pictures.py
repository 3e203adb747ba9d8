"""Pictures as evaluations compare them: square, 8 bits; and how far two of them are apart."""

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

IDENTICAL = 100.0  # dB, for pictures without any difference


def as_square(picture: Image.Image, size: int) -> Image.Image:
    """`size` x `size` pixels by a bicubic, antialiased resize without a crop.

    The report evaluates 256 x 256 pictures and calls the resize "rectangular"; a square without regard to the aspect
    is what the encoder sees as well.
    """
    return picture if picture.size == (size, size) else picture.resize((size, size), Image.Resampling.BICUBIC)


def to_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """n pictures of one size -> (n, 3, height, width) in [0, 1]."""
    return torch.stack([pil_to_tensor(picture) for picture in pictures]).float() / 255


def psnr(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, (n,), of pictures (n, 3, height, width) in [0, 1].

    Identical pictures, whose ratio is infinite, count as 100 dB.
    """
    error = (first.double() - second.double()).square().flatten(1).mean(1)
    return (-10 * error.log10()).clamp(max=IDENTICAL).float()
