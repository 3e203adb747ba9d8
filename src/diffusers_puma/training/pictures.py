"""Pictures to what a decoder trains on: latents of the VAE and features of the encoder, both frozen.

Legend: B pictures, R the training resolution, k_0 tokens of the finest scale, C feature channels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torchvision.transforms.functional import center_crop
from transformers import CLIPVisionModel, default_data_collator

from transformers_puma import PumaImageProcessor
from transformers_puma.granularity import encoder_tokens_per_scale
from transformers_puma.pictures import as_rgb

Row = dict[str, Any]


def square_processor(size: int) -> PumaImageProcessor:
    return PumaImageProcessor(size={"height": size, "width": size})


def collate_cached(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Batches rows of cached `latents` and `features`.

    Raises:
        ValueError: a row that lacks one of them, or rows that differ in their shapes.
    """
    for name in ("latents", "features"):
        lacking = [sorted(row) for row in rows if name not in row]
        if lacking:
            raise ValueError(
                f"a row must hold latents and features, or an image given image_encoder and vae, got {lacking[0]}"
            )
        shapes = {tuple(np.shape(row[name])) for row in rows}
        if len(shapes) > 1:
            raise ValueError(f"rows must agree in the shape of their {name}, got {sorted(shapes)}")
    return default_data_collator(rows)


@dataclass
class PumaDecoderCollator:
    """Batches rows `{"image": PIL image}`; rows of cached `latents` and `features` are batched as they are.

    The largest square in the middle of the picture is what the encoder and the VAE see (report section A.1.1).

    Args:
        encoder_size: pixels of the encoder's input.
        resolution: R, a multiple of what the VAE shrinks by.
        image_processor: the encoder's; by default one with CLIP's mean and standard deviation.

    A call returns `pixel_values` (B, 3, encoder_size, encoder_size) for the encoder and `pictures` (B, 3, R, R) in
    [-1, 1] for the VAE.

    Raises:
        ValueError: an image that is no PIL image, and as `collate_cached`.
    """

    encoder_size: int
    resolution: int
    image_processor: PumaImageProcessor | None = None

    def __post_init__(self) -> None:
        self.for_encoder = self.image_processor or square_processor(self.encoder_size)
        self.for_vae = VaeImageProcessor(vae_scale_factor=1)

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        if "latents" in rows[0] or "image" not in rows[0]:
            return collate_cached(rows)
        wrong = [row["image"] for row in rows if not isinstance(row["image"], Image.Image)]
        if wrong:
            raise ValueError(f"a row's image must be a PIL image, got {type(wrong[0]).__name__}")
        pictures = [as_rgb(row["image"]) for row in rows]
        squares = [center_crop(picture, min(picture.size)) for picture in pictures]
        return {
            "pixel_values": self.for_encoder(squares, return_tensors="pt")["pixel_values"],
            "pictures": self.for_vae.preprocess(squares, self.resolution, self.resolution),
        }


class PictureEncoder:
    """Encoder and VAE of the training, frozen.

    Args:
        image_encoder: the model's; of a `PumaForConditionalGeneration` that is `model.model.vision_tower`.
        vae: whose latents the decoder denoises.
        device: where both go.
        image_processor: the encoder's; by default one with CLIP's mean and standard deviation.

    Raises:
        ValueError: for a VAE in fp16 whose config says that its activations leave that range.
    """

    def __init__(
        self,
        image_encoder: CLIPVisionModel,
        vae: AutoencoderKL,
        device: torch.device,
        image_processor: PumaImageProcessor | None = None,
    ) -> None:
        if vae.config.force_upcast and vae.dtype == torch.float16:
            raise ValueError("this VAE leaves the range of float16 (force_upcast): load it in float32 or bfloat16")
        self.image_encoder = image_encoder.requires_grad_(False).eval().to(device)
        self.vae = vae.requires_grad_(False).eval().to(device)
        self.image_processor = image_processor or square_processor(image_encoder.config.image_size)

    @property
    def num_tokens(self) -> int:
        """k_0"""
        return encoder_tokens_per_scale(self.image_encoder.config)[0]

    @torch.no_grad()
    def latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """(B, 3, R, R) in [-1, 1] -> the means of their latents (B, c, h, w), times the VAE's scaling factor; fp32."""
        latents = self.vae.encode(pictures.to(self.vae.dtype)).latent_dist.mode()
        return latents.float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, height, width) -> features at the finest scale (B, k_0, C), without the class token."""
        return self.image_encoder(pixel_values.to(self.image_encoder.dtype)).last_hidden_state[:, 1:]

    def null_features(self) -> torch.Tensor:
        """(1, k_0, C) of the black image."""
        size = self.image_encoder.config.image_size
        black = self.image_processor(Image.new("RGB", (size, size)))
        return self.features(torch.as_tensor(black["pixel_values"][0])[None].to(self.image_encoder.device))
