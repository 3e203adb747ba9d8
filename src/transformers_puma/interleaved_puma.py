"""Text and images in turns, in the order in which the model writes them; it chooses when to draw.

Legend: B rows, T positions, n images, S tokens of an image, k_i of scale i, C feature channels.
"""

from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from .generation_puma import PumaGenerationMixin, check_generators
from .granularity import flatten_scales
from .image_head_puma import Generators


@dataclass
class InterleavedOutput:
    """What `generate_interleaved` wrote.

    sequences: (B, T) prompt and continuation ids, padded on the right.
    segments: per row, in the order of writing: (n,) ids of a piece of text, or an image as `{scale: (k_scale, C)}`. An
        image that the length limit cut short holds the scales that were completed.
    """

    sequences: torch.Tensor
    segments: list[list[torch.Tensor | dict[int, torch.Tensor]]]


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


class PumaInterleavedGenerationMixin(PumaGenerationMixin):
    """Text of stock `generate` and images of `generate_image_features`, in turns."""

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
        check_generators(generator, len(input_ids))
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
    ) -> list[_Row]:
        given = flatten_scales(self.encode_image(pixel_values)) if pixel_values is not None else input_ids.new_zeros(0)
        counts = self._image_counts(input_ids)
        if sum(counts) != len(given):
            raise ValueError(f"the text holds {sum(counts)} images, but {len(given)} were given")
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return [
            _Row(ids[mask.bool()], list(features), [False] * len(features), budget)
            for ids, mask, features in zip(input_ids, kept, given.split(counts), strict=True)
        ]

    def _draw(self, rows: list[_Row], generator: Generators):
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

    def _write(self, rows: list[_Row], generate_kwargs: dict):
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

    def _batch(self, rows: list[_Row]) -> dict[str, torch.Tensor]:
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
