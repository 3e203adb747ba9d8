"""Writing images: feature by feature, coarse to fine, alone or inside stock text generation (report section 3.3).

Each predicted feature is projected and fed back as the next input, so one picture costs as many passes of the language
model as it has tokens down to the scale asked for. Regression is deterministic: nothing here takes a seed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicCache

from .granularity import split_scales


@dataclass
class InterleavedOutput:
    """What `generate_interleaved` wrote.

    sequences: (B, T) prompt and continuation ids, as from `generate`.
    segments: per row, in the order of writing: (n,) ids of a piece of text, or an image as `{scale: (k_scale, C)}`. An
        image that the length limit cut short holds the scales that were completed.
    """

    sequences: torch.Tensor
    segments: list[list[torch.Tensor | dict[int, torch.Tensor]]]


class ImageSpanLogitsProcessor(LogitsProcessor):
    """After `[IMG]` forces as many placeholders as an image has, then `[/IMG]`; forbids both anywhere else."""

    def __init__(self, prompt_length: int, start_id: int, token_id: int, end_id: int, image_seq_length: int):
        self.prompt_length = prompt_length
        self.start_id, self.token_id, self.end_id = start_id, token_id, end_id
        self.image_seq_length = image_seq_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        # A prompt may itself end in `[IMG]`; nothing before its last token can open a span of the continuation.
        written = input_ids[:, self.prompt_length - 1 :]
        position = torch.arange(written.shape[1], device=written.device)
        opened = torch.where(written == self.start_id, position, -1).max(dim=1).values
        length = position[-1] - opened
        inside = (opened >= 0) & (length < self.image_seq_length)
        complete = (opened >= 0) & (length == self.image_seq_length)

        lowest = torch.finfo(scores.dtype).min
        scores = scores.clone()
        scores[:, [self.token_id, self.end_id]] = lowest
        for rows, forced in ((inside, self.token_id), (complete, self.end_id)):
            scores[rows] = lowest
            scores[rows, forced] = 0
        return scores


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
    ) -> dict[int, torch.Tensor]:
        """Features of one image for each prompt, from the coarsest scale down to `scale`.

        Args:
            input_ids: (B, T), left-padded; every row ends with `[IMG]`.
            attention_mask: (B, T); by default nothing is padding.
            pixel_values: (n, 3, height, width), the images in the prompts.
            scale: the finest scale to generate.
            callback: called as `callback(step, num_steps)` after each of the sum of k_i, i >= `scale`, passes.

        Returns:
            `{scale: (B, k_scale, C)}`.

        Raises:
            ValueError: a scale that the model does not have, or a prompt that does not end with `[IMG]`.
        """
        if not 0 <= scale < self.config.num_scales:
            raise ValueError(f"scale={scale} must be one of 0..{self.config.num_scales - 1}")
        if (input_ids[:, -1] != self.config.image_start_token_id).any():
            raise ValueError(
                f"every prompt must end with [IMG] (id {self.config.image_start_token_id}) and be left-padded"
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)

        num_steps = sum(self.config.tokens_per_scale[scale:])
        cache = DynamicCache(config=self.config.get_text_config())
        # The mask of all steps at once: each pass sees as much of it as there are keys.
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(input_ids), num_steps)], dim=1)
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)

        past, inputs = 0, {"input_ids": input_ids, "pixel_values": pixel_values}
        features = []
        for step in range(num_steps):
            length = past + (input_ids.shape[1] if step == 0 else 1)
            hidden_states = self.model(
                **inputs,
                attention_mask=attention_mask[:, :length],
                position_ids=position_ids[:, past:length],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            features.append(self.image_head(hidden_states[:, -1:]))
            past, inputs = length, {"inputs_embeds": self.model.projector(features[-1])}
            if callback is not None:
                callback(step + 1, num_steps)
        return split_scales(torch.cat(features, dim=1), self.config.tokens_per_scale)

    @torch.no_grad()
    def generate_interleaved(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        **generate_kwargs,
    ) -> InterleavedOutput:
        """Text and images in the order in which the model writes them; it chooses when to draw.

        Greedy search or sampling through stock `generate`, also where the model's own settings say beams: placeholder
        ids take part in its bookkeeping, and the features travel beside them. Each image takes `image_seq_length` + 2
        of `max_new_tokens`.

        Raises:
            ValueError: `num_beams`, `num_return_sequences` or an assistant model, which would reorder rows.
        """
        for name in ("num_beams", "num_return_sequences", "assistant_model"):
            if generate_kwargs.get(name) not in (None, 1):
                raise ValueError(f"{name}={generate_kwargs[name]} does not work with interleaved generation")
        features: list[torch.Tensor] = []
        span = ImageSpanLogitsProcessor(
            prompt_length=input_ids.shape[1],
            start_id=self.config.image_start_token_id,
            token_id=self.config.image_token_id,
            end_id=self.config.image_end_token_id,
            image_seq_length=self.config.image_seq_length,
        )
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
        processors = [*(generate_kwargs.pop("logits_processor", None) or []), span]
        for name in ("num_beams", "num_return_sequences"):
            generate_kwargs[name] = 1
        sequences = self.generate(
            **{name: value for name, value in inputs.items() if value is not None},
            **generate_kwargs,
            generated_features=features,
            logits_processor=LogitsProcessorList(processors),
            suppress_tokens=None,
            return_dict_in_generate=False,
        )
        written = sequences[:, input_ids.shape[1] :]
        predicted = torch.stack(features, dim=1)
        segments = [self._segments(ids, row) for ids, row in zip(written, predicted, strict=True)]
        return InterleavedOutput(sequences, segments)

    def _segments(self, ids: torch.Tensor, features: torch.Tensor) -> list:
        """Splits one row's continuation into text (its ids without `[IMG]`, `[/IMG]` and padding) and images."""
        is_image = ids == self.config.image_token_id
        changes = (is_image[1:] != is_image[:-1]).nonzero().flatten() + 1
        segments = []
        for run, feature_run in zip(
            ids.tensor_split(changes.cpu()), features[: len(ids)].tensor_split(changes.cpu()), strict=True
        ):
            if len(run) and run[0] == self.config.image_token_id:
                image = split_scales(feature_run[None], self.config.tokens_per_scale)
                if image:
                    segments.append({scale: feature[0] for scale, feature in image.items()})
                continue
            marks = [self.config.image_start_token_id, self.config.image_end_token_id]
            if self.generation_config.pad_token_id is not None:
                marks.append(self.generation_config.pad_token_id)
            text = run[~torch.isin(run, torch.tensor(marks, device=run.device))]
            if len(text):
                segments.append(text)
        return segments

    def prepare_inputs_for_generation(self, input_ids, generated_features: list[torch.Tensor] | None = None, **kwargs):
        """Stock inputs, and the features that were predicted for those of the last positions that are being fed."""
        model_inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if generated_features is not None:
            fed = model_inputs["input_ids"].shape[1]
            recent = generated_features[-fed:] if kwargs.get("use_cache", True) else generated_features
            model_inputs["generated_features"] = (
                torch.stack(recent, dim=1)
                if recent
                else self.image_head.weight.new_zeros(len(input_ids), 0, self.image_head.out_features)
            )
        return model_inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Rows for beams or several answers, each copy with all pictures of its row.

        Older versions of transformers repeat the pictures one by one, which is right for one picture a row only.
        """
        pixel_values = model_kwargs.pop("pixel_values", None)
        if pixel_values is not None and expand_size > 1:
            mask = input_ids == self.config.image_token_id
            counts = mask[:, 0].int() + (mask[:, 1:] & ~mask[:, :-1]).sum(dim=1)
            rows = pixel_values.split(counts.tolist())
            pixel_values = torch.cat([row for row in rows for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        return input_ids, model_kwargs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        if model_kwargs.get("generated_features") is not None:
            model_kwargs["generated_features"].append(outputs.next_image_feature)
        return model_kwargs
