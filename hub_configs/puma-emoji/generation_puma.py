"""Writing the features of images, coarse to fine (report section 3.3), and text by stock `generate`.

How many passes of the language model a picture costs, and what each is fed, is `config.image_decoding`'s; see
`image_decoding_puma`. Regression is deterministic; a flow head draws its noise from `generator`.

Legend: B rows, T positions, n images, S tokens of an image, k_i of scale i, C feature channels.
"""

from collections.abc import Callable
from numbers import Integral

import torch
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache

from .granularity import flatten_scales, scale_of_position, split_scales
from .image_decoding_puma import decoding_passes
from .image_head_puma import Generators
from .image_positions_puma import ImagePositions


class PumaGenerationMixin(GenerationMixin):
    """Generation of text (stock) and of features."""

    @torch.no_grad()
    def generate_image_features(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        scale: int = 0,
        callback: Callable[[int, int], None] | None = None,
        generator: Generators = None,
        image_features: torch.Tensor | None = None,
        image_loss_mask: torch.Tensor | None = None,
    ) -> dict[int, torch.Tensor]:
        """Features of one image for each prompt, from the coarsest scale down to `scale`.

        Args:
            input_ids: (B, T), left-padded; every row ends with `[IMG]`.
            attention_mask: (B, T); by default nothing is padding.
            pixel_values: (n, 3, height, width), the images in the prompts.
            scale: the finest scale to generate.
            callback: called as `callback(pass, num_passes)` after each pass of the language model: the sum of k_i,
                i >= `scale`, for autoregressive decoding, one for each scale or one in all for the others.
            generator: of the flow head's noise; a list with one for each row makes each row the same in any batch.
            image_features, image_loss_mask: (n, S, C) and (n,), in place of `pixel_values`, as in `forward`.

        Returns:
            `{scale: (B, k_scale, C)}`.

        Raises:
            ValueError: a scale that the model does not have, a prompt that does not end with `[IMG]` or is too long,
                images from two sources or other than the prompts hold, or another number of generators than rows.
        """
        if not isinstance(scale, Integral) or not 0 <= scale < self.config.num_scales:
            raise ValueError(f"scale={scale!r} must be one of 0..{self.config.num_scales - 1}")
        if pixel_values is not None and image_features is not None:
            raise ValueError("images must come from one of pixel_values and image_features")
        if (input_ids[:, -1] != self.config.image_start_token_id).any():
            raise ValueError(
                f"every prompt must end with [IMG] (id {self.config.image_start_token_id}) and be left-padded"
            )
        check_generators(generator, len(input_ids))

        counts = self.config.tokens_per_scale
        self._check_length(input_ids.shape[1], sum(counts[scale:]))
        passes = decoding_passes(self.config.image_decoding, counts, scale)
        scales = scale_of_position(counts).to(input_ids.device)
        noise = self.draw_feature_noise(len(input_ids), scale, generator, input_ids.device)
        shape = len(input_ids), 0, self.config.vision_config.hidden_size
        features = torch.zeros(shape, dtype=self.dtype, device=input_ids.device)

        position_ids = None
        if attention_mask is None or attention_mask.all():
            attention_mask = None  # nothing to look through, and no mask to build, in each pass
        else:
            # The mask of all passes at once: each sees as much of it as there are keys.
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(input_ids), sum(counts))], dim=1)
            position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.config.get_text_config())
        inputs_embeds, blocks = self._embed_prompt(input_ids, pixel_values, image_features, image_loss_mask)
        past = 0
        for number, (fed, written) in enumerate(passes):
            inputs_embeds, blocks = self._feed(inputs_embeds, blocks, features, fed)
            length = past + inputs_embeds.shape[1]
            hidden_states = self.model(
                inputs_embeds=inputs_embeds,
                attention_mask=_columns(attention_mask, slice(length)),
                position_ids=_columns(position_ids, slice(past, length)),
                cache=cache,
                use_cache=True,
                attention_blocks=blocks,
            ).last_hidden_state
            states = hidden_states[:, -(written.stop - written.start) :]
            new = self.predict_features(states, scales[written], _columns(noise, written))
            features = torch.cat([features, new.to(features.device)], dim=1)
            past, inputs_embeds, blocks = length, inputs_embeds[:, :0], _columns(blocks, slice(0))
            if callback is not None:
                callback(number + 1, len(passes))
        return split_scales(features, counts)

    def _embed_prompt(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor | None,
        image_features: torch.Tensor | None,
        image_loss_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, H) embeddings of text and images, and (B, T) their attention blocks where there are such."""
        if pixel_values is not None:
            image_features = flatten_scales(self.encode_image(pixel_values))
        if image_features is None:
            self._check_no_images(input_ids)
            inputs_embeds = self.get_input_embeddings()(input_ids)
            positions = ImagePositions.find(input_ids, self.config.image_token_id)
        else:
            inputs_embeds, positions = self.model.embed(input_ids, image_features, image_loss_mask)
        is_blockwise = self.config.image_decoding == "next_scale"
        return inputs_embeds, positions.scale_blocks(self.config.tokens_per_scale) if is_blockwise else None

    def _feed(
        self, inputs_embeds: torch.Tensor, blocks: torch.Tensor | None, features: torch.Tensor, positions: slice
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings (B, T, H) and blocks (B, T), with what a pass is fed of the images (B, m, C) behind them."""
        if positions.stop == positions.start:
            return inputs_embeds, blocks
        states = self.model.written_states(features, positions).to(inputs_embeds)
        if blocks is not None:  # what one pass is fed is of one scale; no prompt has as many blocks
            own = blocks.new_full(states.shape[:2], torch.iinfo(blocks.dtype).max)
            blocks = torch.cat([blocks, own], dim=1)
        return torch.cat([inputs_embeds, states], dim=1), blocks

    def predict_features(
        self, states: torch.Tensor, scales: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Features (B, m, C) from states (B, m, H) of tokens at `scales` (m,), and unit noise (B, m, C) where the head
        samples."""
        if self.config.image_head == "flow":
            return self.image_head.predict(states, scales, noise, self.config.flow_num_steps)
        return self.image_head(states)

    def draw_feature_noise(
        self, num_rows: int, scale: int, generator: Generators, device: torch.device
    ) -> torch.Tensor | None:
        """(B, sum of k_i, C) unit noise for a flow head, see `PumaFlowHead.draw_noise`: a finer `scale` changes no
        other's. None for a head that takes no noise.

        Args:
            generator: as of `generate_image_features`.
        """
        if self.config.image_head != "flow":
            return None
        counts = self.config.tokens_per_scale[scale:][::-1]
        return self.image_head.draw_noise(num_rows, counts, generator, device)

    def _pad_id(self) -> int:
        eos = self.generation_config.eos_token_id
        eos = eos[0] if isinstance(eos, list) else eos
        pad = self.generation_config.pad_token_id
        # A row that is padded is masked, so any id but an image's will do where the model names none.
        return pad if pad is not None else eos if eos is not None else 0

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, is_first_iteration=False, **kwargs):
        """Stock inputs; images that come as features are read once, as pixels are. `generate` looks for the names."""
        if not is_first_iteration and kwargs.get("use_cache", True):
            kwargs = {name: kwargs[name] for name in kwargs.keys() - {"image_features", "image_loss_mask"}}
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        # The encoder's outputs come as a dict, empty without images.
        given = (inputs.get("pixel_values"), inputs.get("image_features"), inputs.get("mm_encoder_outputs") or None)
        has_images = any(images is not None for images in given)
        if is_first_iteration and not has_images and inputs.get("input_ids") is not None:
            self._check_no_images(inputs["input_ids"])
        if is_first_iteration:
            self._check_length(input_ids.shape[1])
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Rows for beams or several answers, each copy with all pictures of its row.

        Older versions of transformers repeat the pictures one by one, which is right for one picture a row only.
        """
        images = {name: model_kwargs.pop(name, None) for name in ("pixel_values", "image_features", "image_loss_mask")}
        images = {name: value for name, value in images.items() if value is not None}
        if images and expand_size > 1:
            counts = self._image_counts(input_ids)
            for name, value in images.items():
                images[name] = torch.cat([row for row in value.split(counts) for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | images

    def _check_no_images(self, input_ids: torch.LongTensor):
        """Raises a ValueError if there are placeholders, which nothing would fill."""
        if num_images := sum(self._image_counts(input_ids)):
            raise ValueError(
                f"the text holds {num_images} images, but 0 were given (each prompt is read whole: prefill_chunk_size "
                "does not work with images)"
            )

    def _check_length(self, prompt: int, image: int = 0):
        """Raises a ValueError if these numbers of tokens are more than the language model has positions for."""
        room = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and prompt + image > room:
            drawn = f" and an image of {image}" if image else ""
            raise ValueError(f"a prompt of {prompt} tokens{drawn} does not fit the {room} of the language model")

    def _image_counts(self, input_ids: torch.LongTensor) -> list[int]:
        """How many images each row holds."""
        return ImagePositions.find(input_ids, self.config.image_token_id).counts()


def _columns(values: torch.Tensor | None, positions: slice) -> torch.Tensor | None:
    return None if values is None else values[:, positions]


def check_generators(generator: Generators, num_rows: int):
    """Raises a ValueError unless a list of generators has one for each row."""
    if isinstance(generator, list) and len(generator) != num_rows:
        raise ValueError(f"got {len(generator)} generators for {num_rows} prompts")
