"""Pixels for the encoder: straight resize to its size, CLIP mean and standard deviation (report section 3.1)."""

import os

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
        """As in transformers, but a file's transparent parts are white too, and its 16-bit grey is not clipped."""
        if isinstance(image_url_or_urls, str) and os.path.isfile(image_url_or_urls):
            with Image.open(image_url_or_urls) as picture:
                return as_rgb(picture)
        return super().fetch_images(image_url_or_urls)

    def convert_to_rgb(self, image, input_data_format=None):
        """Of a PIL picture what `as_rgb` gives: upright, for one."""
        return super().convert_to_rgb(as_rgb(image) if isinstance(image, Image.Image) else image, input_data_format)
