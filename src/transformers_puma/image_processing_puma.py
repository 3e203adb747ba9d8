"""Pixels for the encoder: straight resize to its size, CLIP mean and standard deviation (report section 3.1)."""

import base64
import os
from io import BytesIO

import numpy as np
from huggingface_hub.utils import httpx
from PIL import Image
from transformers.image_utils import PILImageResampling
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .pictures import as_rgb


class PumaImageProcessor(CLIPImageProcessorPil):
    """CLIP preprocessing as the released decoders use it: bilinear, antialiased, no crop, whatever the aspect ratio.

    Resizes with PIL rather than on tensors, which differs by a grey level here and there.
    """

    resample = PILImageResampling.BILINEAR
    size = {"height": 224, "width": 224}
    do_center_crop = False

    def fetch_images(self, image_url_or_urls):
        """As in transformers, but of files and URLs too transparent parts are white and 16-bit grey is not clipped."""
        source = image_url_or_urls
        if isinstance(source, os.PathLike):
            source = os.fspath(source)
        if not isinstance(source, str):
            return super().fetch_images(source)
        if source.startswith(("http://", "https://")):
            source = BytesIO(httpx.get(source, follow_redirects=True, timeout=None).raise_for_status().content)
        elif source.startswith("data:image/"):
            source = BytesIO(base64.b64decode(source.partition(",")[2]))
        elif not os.path.isfile(source):
            return super().fetch_images(source)
        with Image.open(source) as picture:
            return as_rgb(picture)

    def rescale(self, image: np.ndarray, scale: float, **kwargs) -> np.ndarray:
        """As in transformers, which would make floats in [0, 1] nearly black.

        Raises:
            ValueError: such an array.
        """
        if np.issubdtype(image.dtype, np.floating) and 0 < image.max() <= 1:
            raise ValueError(
                f"a picture of floats in [0, 1] (up to {image.max():.3f}) would be divided by 255 once more: expected "
                "0 to 255, or do_rescale=False"
            )
        return super().rescale(image, scale, **kwargs)

    def convert_to_rgb(self, image, input_data_format=None):
        """Of a PIL picture what `as_rgb` gives: upright, for one."""
        return super().convert_to_rgb(as_rgb(image) if isinstance(image, Image.Image) else image, input_data_format)
