"""What `PumaPipeline` returns."""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image

Images = list[Image.Image] | np.ndarray | torch.Tensor


@dataclass
class PumaPipelineOutput(BaseOutput):
    """Pictures and the features that they were decoded from.

    images: pictures in the order of the prompts, `num_images_per_prompt` of each: a list of PIL images, (N, height,
        width, 3) numpy or (N, 3, height, width) torch in [0, 1], or latents, as `output_type` asks. For several
        scales a dict `{scale: pictures}`.
    image_features: `{scale: (B, k_scale, C)}`, one row per prompt (with a flow head per picture, N), every scale that
        the first stage computed; can be given back to the pipeline to skip that stage.
    """

    images: Images | dict[int, Images]
    image_features: dict[int, torch.Tensor]
