"""Pixels for the encoder: straight resize to its size, CLIP mean and standard deviation (report section 3.1)."""

from transformers.image_utils import PILImageResampling
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


class PumaImageProcessor(CLIPImageProcessorPil):
    """CLIP preprocessing as the released decoders use it: bilinear, antialiased, no crop, whatever the aspect ratio.

    Resizes with PIL rather than on tensors, which differs by a grey level here and there.
    """

    resample = PILImageResampling.BILINEAR
    size = {"height": 224, "width": 224}
    do_center_crop = False
