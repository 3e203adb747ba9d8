"""The first stage of `PumaPipeline`: pictures or text -> features. Knows no decoder.

Legend: B prompts, n pictures, k tokens of a scale, C feature channels.
"""

from typing import Any

import torch
from PIL import Image
from transformers import CLIPVisionModel

from transformers_puma import (
    PumaForConditionalGeneration,
    PumaImageProcessor,
    multigranular_features,
)
from transformers_puma.granularity import encoder_tokens_per_scale
from transformers_puma.image_decoding_puma import decoding_passes

from .loading import bring_in

Features = dict[int, torch.Tensor]


class FeatureStageMixin:
    """Encoder and language model of a pipeline with the components `mllm`, `processor` and `image_encoder`."""

    _black_features: tuple[torch.nn.Module, Features] | None = None

    @torch.no_grad()
    def encode_image(self, images: list[Image.Image]) -> Features:
        """Features `{scale: (n, k, C)}` of n pictures at all scales of the encoder, without the language model.

        Raises:
            ValueError: no encoder.
        """
        self._check_encoder()
        if self.processor is not None:
            preprocess = self.processor.image_processor
        else:
            size = self._vision_config.image_size
            preprocess = PumaImageProcessor(size={"height": size, "width": size})
        pixel_values = preprocess(images, return_tensors="pt")["pixel_values"]
        pixel_values = pixel_values.to(bring_in(self, self._encoder), self._encoder.dtype)
        if self.mllm is not None:
            return self.mllm.encode_image(pixel_values)
        features = self.image_encoder(pixel_values).last_hidden_state[:, 1:]
        return dict(enumerate(multigranular_features(features, len(self._tokens_per_scale))))

    def generate_image_features(
        self,
        prompts: list[str],
        images: list[list[Image.Image]] | None,
        scale: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Features:
        """Features `{scale: (B, k, C)}` that the language model writes, from the coarsest scale down to `scale`.

        Args:
            generator: one, or one for each prompt, of features that are samples (`image_head="flow"`).

        Raises:
            ValueError: no language model.
        """
        self._check_language_model("a prompt")
        inputs = self.processor.prepare_generation(prompts, images).to(bring_in(self, self.mllm))
        passes = decoding_passes(self.mllm.config.image_decoding, self._tokens_per_scale, scale)
        with self.progress_bar(total=len(passes)) as bar:
            bar.set_postfix_str("features")
            return self.mllm.generate_image_features(
                **inputs, scale=scale, callback=lambda step, num_steps: bar.update(), generator=generator
            )

    def black_image_features(self) -> Features:
        """Features `{scale: (1, k, C)}` of a black picture, the unconditional input of guidance (report section 3.2).

        Encoded once per pipeline and encoder.

        Raises:
            ValueError: no encoder.
        """
        self._check_encoder()
        if self._black_features is None or self._black_features[0] is not self._encoder:
            size = self._vision_config.image_size
            self._black_features = self._encoder, self.encode_image([Image.new("RGB", (size, size))])
        return self._black_features[1]

    def _check_language_model(self, what: str) -> None:
        if self.mllm is None or self.processor is None:
            raise ValueError(f"{what} needs the language model and its processor, and this pipeline has none")

    def _check_encoder(self) -> None:
        if self._encoder is None:
            raise ValueError("an image needs an image encoder or a language model, and this pipeline has none")

    @property
    def _encoder(self) -> PumaForConditionalGeneration | CLIPVisionModel | None:
        return self.mllm if self.mllm is not None else self.image_encoder

    @property
    def _vision_config(self) -> Any:
        return self.mllm.config.vision_config if self.mllm is not None else self.image_encoder.config

    @property
    def _tokens_per_scale(self) -> list[int]:
        """Token counts of the encoder's scales; a bare encoder has as many scales as its grid can be halved for."""
        if self.mllm is not None:
            return self.mllm.config.tokens_per_scale
        return encoder_tokens_per_scale(self._vision_config)
