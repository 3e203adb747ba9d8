"""Writing images, coarse to fine, alone or between pieces of text (report section 3.3).

How many passes of the language model a picture costs, and what each is fed, is `config.image_decoding`'s; see
`image_decoding_puma`. Regression is deterministic; a flow head draws its noise from `generator`.

Legend: B rows, T positions, n images, S tokens of an image, k_i of scale i, C feature channels.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache

from .granularity import flatten_scales, scale_of_position, split_scales
from .image_decoding_puma import decoding_passes
from .image_positions_puma import ImagePositions

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class InterleavedOutput:
    """What `generate_interleaved` wrote.

    sequences: (B, T) prompt and continuation ids, padded on the right.
    segments: per row, in the order of writing: (n,) ids of a piece of text, or an image as `{scale: (k_scale, C)}`. An
        image that the length limit cut short holds the scales that were completed.
    """

    sequences: torch.Tensor
    segments: list[list[torch.Tensor | dict[int, torch.Tensor]]]


class PumaGenerationMixin(GenerationMixin):
    """Generation of text (stock), of features, and of both interleaved."""

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
        _check_generators(generator, len(input_ids))

        counts = self.config.tokens_per_scale
        self._check_length(input_ids.shape[1], sum(counts[scale:]))
        passes = decoding_passes(self.config.image_decoding, counts, scale)
        scales = scale_of_position(counts).to(input_ids.device)
        noise = self.draw_feature_noise(len(input_ids), scale, generator, input_ids.device)
        shape = len(input_ids), 0, self.config.vision_config.hidden_size
        features = torch.zeros(shape, dtype=self.dtype, device=input_ids.device)

        is_padded = attention_mask is not None and not attention_mask.all()
        if is_padded:
            # The mask of all passes at once: each sees as much of it as there are keys.
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(input_ids), sum(counts))], dim=1)
            position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.config.get_text_config())
        inputs_embeds, blocks = self._embed_prompt(input_ids, pixel_values, image_features, image_loss_mask)
        past = 0
        for number, (fed, written) in enumerate(passes):
            if fed.stop > fed.start:
                states = self.model.written_states(features, fed)
                inputs_embeds = torch.cat([inputs_embeds, states.to(inputs_embeds)], dim=1)
                if blocks is not None:  # what one pass is fed is of one scale; no prompt has as many blocks
                    own = blocks.new_full((len(blocks), states.shape[1]), torch.iinfo(blocks.dtype).max)
                    blocks = torch.cat([blocks, own], dim=1)
            length = past + inputs_embeds.shape[1]
            hidden_states = self.model(
                inputs_embeds=inputs_embeds,
                # Without padding there is nothing to look through, and no mask to build, in each pass.
                attention_mask=attention_mask[:, :length] if is_padded else None,
                position_ids=position_ids[:, past:length] if is_padded else None,
                cache=cache,
                use_cache=True,
                attention_blocks=blocks,
            ).last_hidden_state
            states = hidden_states[:, -(written.stop - written.start) :]
            new = self.predict_features(states, scales[written], None if noise is None else noise[:, written])
            features = torch.cat([features, new.to(features.device)], dim=1)
            past, inputs_embeds = length, inputs_embeds[:, :0]
            blocks = blocks[:, :0] if blocks is not None else None
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
        """(B, sum of k_i, C) unit noise for a flow head, drawn scale by scale: a finer `scale` changes no other's, nor
        what is left of the generators. None for a head that takes no noise.

        Args:
            generator: as of `generate_image_features`.
        """
        if self.config.image_head != "flow":
            return None
        channels = self.config.vision_config.hidden_size
        generators = [_split(g, device) for g in (generator if isinstance(generator, list) else [generator])]
        rows = num_rows // len(generators)
        parts = [
            torch.cat(
                [
                    # On the generator's own device: the same seed gives the same noise on any.
                    torch.randn(rows, count, channels, generator=g, device=g.device).to(device)
                    for g in generators
                ]
            )
            for count in reversed(self.config.tokens_per_scale[scale:])
        ]
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def generate_interleaved(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        max_new_tokens: int | None = None,
        generator: Generators = None,
        **generate_kwargs,
    ) -> InterleavedOutput:
        """Text and images in the order in which the model writes them; it chooses when to draw.

        Text comes from stock `generate`, greedy or sampled, until `[IMG]`; the image from `generate_image_features`;
        and so on in turns, a batch of rows at a time.

        Args:
            input_ids, attention_mask: (B, T), padded on either side.
            pixel_values: (n, 3, height, width), the images in the prompts.
            max_new_tokens: for each row; an image takes `image_seq_length` + 2 of them. By default that of a given
                `generation_config`, or 1024.
            generator: of a flow head's noise; a list with one for each row makes a row's images the same in any batch.
            generate_kwargs: of `generate`, for the text.

        Raises:
            ValueError: `num_beams`, `num_return_sequences` or an assistant model, which would reorder rows;
                `max_length` or a streamer, which would end at the first image; another number of generators than
                rows; another number of images than in the prompts.
        """
        for name in ("num_beams", "num_return_sequences", "assistant_model", "max_length", "streamer"):
            if generate_kwargs.get(name) not in (None, 1):
                raise ValueError(f"{name}={generate_kwargs[name]} does not work with interleaved generation")
        _check_generators(generator, len(input_ids))
        if max_new_tokens is None:
            max_new_tokens = getattr(generate_kwargs.get("generation_config"), "max_new_tokens", None) or 1024
        rows = self._interleaved_rows(input_ids, attention_mask, pixel_values, max_new_tokens)
        if isinstance(generator, list):
            for row, own in zip(rows, generator, strict=True):
                row.generator = own
        while any(row.budget for row in rows):
            drawing = [row for row in rows if row.budget and row.ids[-1] == self.config.image_start_token_id]
            if drawing:
                self._draw(drawing, generator)
            else:
                self._write([row for row in rows if row.budget], generate_kwargs)
        written = [row.ids[len(row.ids) - row.written :] for row in rows]
        continuations = pad_sequence(written, batch_first=True, padding_value=self._pad_id())
        return InterleavedOutput(torch.cat([input_ids, continuations], dim=1), [row.segments for row in rows])

    def _interleaved_rows(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        budget: int,
    ) -> list["_Row"]:
        given = flatten_scales(self.encode_image(pixel_values)) if pixel_values is not None else input_ids.new_zeros(0)
        counts = self._image_counts(input_ids)
        if sum(counts) != len(given):
            raise ValueError(f"the text holds {sum(counts)} images, but {len(given)} were given")
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return [
            _Row(ids[mask.bool()], list(features), [False] * len(features), budget)
            for ids, mask, features in zip(input_ids, kept, given.split(counts), strict=True)
        ]

    def _draw(self, rows: list["_Row"], generator: Generators):
        """One image for each row, which ends with `[IMG]`, as far as its budget goes."""
        if isinstance(generator, list):
            generator = [row.generator for row in rows]
        counts = self.config.tokens_per_scale
        finest = [min(s for s in range(len(counts)) if sum(counts[s:]) <= max(row.budget, counts[-1])) for row in rows]
        features = self.generate_image_features(**self._batch(rows), scale=min(finest), generator=generator)
        for i, (row, scale) in enumerate(zip(rows, finest, strict=True)):
            image = {s: feature[i] for s, feature in features.items() if s >= scale}
            row.segments.append(image)
            sequence = flatten_scales({s: feature[None] for s, feature in image.items()})[0]
            row.append(row.ids.new_full((len(sequence),), self.config.image_token_id))
            if scale > 0 or not row.budget:
                row.budget = 0
                continue
            row.features.append(sequence)
            row.is_written.append(True)
            row.append(row.ids.new_tensor([self.config.image_end_token_id]))

    def _write(self, rows: list["_Row"], generate_kwargs: dict):
        """Text for each row, until it ends, opens an image or has used up its budget."""
        eos = self._setting("eos_token_id", generate_kwargs)
        stops = [*(eos if isinstance(eos, list) else [] if eos is None else [eos]), self.config.image_start_token_id]
        own = {self.config.image_token_id, self.config.image_end_token_id}
        forbidden = own.union(self._setting("suppress_tokens", generate_kwargs) or [])
        inputs = self._batch(rows)
        sequences = self.generate(
            **inputs,
            **{
                **generate_kwargs,
                "num_beams": 1,
                "num_return_sequences": 1,
                "max_new_tokens": max(row.budget for row in rows),
                "eos_token_id": stops,
                "pad_token_id": self._pad_id(),
                "suppress_tokens": sorted(forbidden - {self.config.image_start_token_id}),  # here it may open an image
                "return_dict_in_generate": False,
            },
        )
        for row, ids in zip(rows, sequences[:, inputs["input_ids"].shape[1] :], strict=True):
            ids = ids[: row.budget]
            ends = torch.isin(ids, ids.new_tensor(stops)).nonzero()
            # A row that a stopping criterion ends before the others is padded.
            padding = (ids.flip(0) != self._pad_id()).int().argmax()
            ids = ids[: ends[0] + 1 if len(ends) else len(ids) - padding]
            row.append(ids)
            is_drawing = ids[-1] == self.config.image_start_token_id
            text = ids[:-1] if is_drawing else ids
            if len(text):
                row.segments.append(text)
            if not is_drawing:
                row.budget = 0

    def _setting(self, name: str, generate_kwargs: dict):
        """As `generate` takes it: keywords win, then the config that is given, then the model's own."""
        if name in generate_kwargs:
            return generate_kwargs[name]
        given = getattr(generate_kwargs.get("generation_config"), name, None)
        return getattr(self.generation_config, name) if given is None else given

    def _batch(self, rows: list["_Row"]) -> dict[str, torch.Tensor]:
        """The rows so far as one left-padded batch, with the images in them."""
        ids = [row.ids for row in rows]
        kept = [torch.ones_like(row_ids) for row_ids in ids]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self._pad_id(), padding_side="left"),
            "attention_mask": pad_sequence(kept, batch_first=True, padding_side="left"),
        }
        features = [feature for row in rows for feature in row.features]
        if features:
            written = [flag for row in rows for flag in row.is_written]
            batch["image_features"] = torch.stack(features)
            batch["image_loss_mask"] = torch.tensor(written, device=ids[0].device)
        return batch

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


def _split(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """A generator that is seeded by one draw from another, or from the global random state of a device."""
    device = device if generator is None else generator.device
    seed = torch.randint(2**63 - 1, (), generator=generator, device=device)
    return torch.Generator(device).manual_seed(seed.item())


def _check_generators(generator: Generators, num_rows: int):
    if isinstance(generator, list) and len(generator) != num_rows:
        raise ValueError(f"got {len(generator)} generators for {num_rows} prompts")


@dataclass
class _Row:
    """A row of interleaved generation.

    ids: (t,) what it holds so far.
    features, is_written: its complete images (S, C), and which of them it wrote itself.
    budget: tokens that it may still write; 0 once it has ended.
    generator: of its own images' noise, where rows have one each.
    """

    ids: torch.Tensor
    features: list[torch.Tensor]
    is_written: list[bool]
    budget: int
    generator: torch.Generator | None = None
    written: int = 0
    segments: list[torch.Tensor | dict[int, torch.Tensor]] = field(default_factory=list)

    def append(self, ids: torch.Tensor):
        ids = ids[: self.budget]
        self.ids = torch.cat([self.ids, ids])
        self.written += len(ids)
        self.budget -= len(ids)
