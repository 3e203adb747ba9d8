"""PUMA's language model: encode images, pool them, splice them into the text, run a stock decoder, read both heads.

This file knows no pictures beyond `pixel_values` and no decoder: it takes and gives features.

Legend: B rows, T positions, n images (in the order of their placeholders, row by row), C feature channels, H hidden
size, k_i tokens of scale i, S = sum of all k_i (`config.image_seq_length`).
"""

from dataclasses import dataclass
from functools import wraps

import torch
from torch import nn
from transformers import AutoModel, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check

from .configuration_puma import PumaConfig
from .generation_puma import PumaGenerationMixin
from .granularity import flatten_scales, multigranular_features, scale_of_position
from .loss_puma import image_loss, squared_error, text_loss


@dataclass
class PumaModelOutputWithPast(BaseModelOutputWithPast):
    """`last_hidden_state` (B, T, H) and the images of the sequence.

    image_features: (n, S, C) encoder features, coarsest scale first; None without images.
    image_positions: where they stand, see `ImagePositions`.
    """

    image_features: torch.Tensor | None = None
    image_positions: "ImagePositions | None" = None


@dataclass
class PumaCausalLMOutputWithPast(ModelOutput):
    """Output of `PumaForConditionalGeneration`.

    loss: weighted sum of `text_loss` and `image_loss`; all three None without labels.
    scale_losses: (num_scales,) unweighted squared error per scale over this batch's supervised image tokens, NaN
        where a scale has none; detached, for logging.
    logits: (B, T, V).
    image_features: (n, S, C) encoder features of the images.
    next_image_feature: (B, C) feature predicted at the last position; only while generating interleaved.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    text_loss: torch.Tensor | None = None
    image_loss: torch.Tensor | None = None
    scale_losses: torch.Tensor | None = None
    image_features: torch.Tensor | None = None
    next_image_feature: torch.Tensor | None = None


@dataclass
class ImagePositions:
    """Where images stand in a batch of sequences; each (B, T).

    mask: True at image placeholders.
    image: index of the image in the whole batch.
    offset: position within the image, 0 at its coarsest token.
    """

    mask: torch.Tensor
    image: torch.Tensor
    offset: torch.Tensor

    @classmethod
    def find(cls, input_ids: torch.Tensor, image_token_id: int) -> "ImagePositions":
        """An image is a run of placeholders; the last one of a row may be cut short."""
        mask = input_ids == image_token_id
        first = mask.clone()
        first[:, 1:] &= ~mask[:, :-1]
        image = first.flatten().cumsum(0).view_as(input_ids) - 1
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        offset = positions - torch.where(first, positions, 0).cummax(dim=1).values
        return cls(mask, image, offset)


class PumaPreTrainedModel(PreTrainedModel):
    config: PumaConfig
    config_class = PumaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    output_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    # diffusers reads from the signature whether to pass on `variant` and `max_shard_size`.
    @wraps(PreTrainedModel.save_pretrained, assigned=())
    def save_pretrained(self, *args, **kwargs):
        """As in transformers; the folder also loads with `trust_remote_code=True` where this package is not
        installed."""
        self.config.auto_map = {
            "AutoConfig": "configuration_puma.PumaConfig",
            "AutoModel": "modeling_puma.PumaModel",
            "AutoModelForMultimodalLM": "modeling_puma.PumaForConditionalGeneration",
            "AutoModelForImageTextToText": "modeling_puma.PumaForConditionalGeneration",
        }
        return super().save_pretrained(*args, **kwargs)


class PumaModel(PumaPreTrainedModel):
    """Encoder, projector and language model, without heads."""

    # A checkpoint of the whole model holds the heads as well.
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"^image_head\."]

    def __init__(self, config: PumaConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.projector = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @torch.no_grad()
    def encode_image(self, pixel_values: torch.Tensor) -> dict[int, torch.Tensor]:
        """(n, 3, height, width) -> `{scale: (n, k_scale, C)}`: patch features before the last layernorm, class token
        dropped, pooled (report section 3.1).

        Without gradient: the encoder defines the regression targets and is frozen in every stage (report section 3.2).
        """
        features = self.vision_tower(pixel_values.to(self.vision_tower.dtype)).last_hidden_state[:, 1:]
        return dict(enumerate(multigranular_features(features, self.config.num_scales)))

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """`last_hidden_state`: (n, S, C) encoder features, coarsest first; `pooler_output`: (n, S, H), projected."""
        features = flatten_scales(self.encode_image(pixel_values))
        return self._project(features)

    def _project(self, features: torch.Tensor) -> BaseModelOutputWithPooling:
        features = features.to(self.projector.weight.dtype)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=self.projector(features))

    def _is_read(self, positions: ImagePositions, image_loss_mask: torch.Tensor | None) -> torch.Tensor:
        """(B, T) bool: image positions whose feature the language model sees.

        `input_scales` hides scales of images that are given, never of those that are written; a hidden position
        keeps the placeholder's embedding.
        """
        if self.config.input_scales is None:
            return positions.mask
        scales = scale_of_position(self.config.tokens_per_scale).to(positions.offset.device)
        scale = scales[positions.offset.clamp(max=len(scales) - 1)]
        visible = torch.isin(scale, torch.tensor(self.config.input_scales, device=scale.device))
        if image_loss_mask is not None and len(image_loss_mask):
            visible |= image_loss_mask.to(scale.device, torch.bool)[positions.image.clamp(min=0)]
        return positions.mask & visible

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        image_loss_mask: torch.Tensor | None = None,
        feature_noise: float = 0.0,
        generated_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PumaModelOutputWithPast:
        """
        Args:
            input_ids: (B, T); each image is a run of placeholders.
            pixel_values: (n, 3, height, width), one for each run in `input_ids`, row by row.
            image_features: (n, S, C) encoder features, coarsest first, in place of `pixel_values`.
            image_loss_mask: (n,) bool, images that the model writes; `input_scales` does not hide anything of them.
            feature_noise: standard deviation of noise on the features that are read, in units of each channel's own
                over the batch, drawn up to this for each image; regression targets stay clean.
            generated_features: (B, m, C) features that were predicted for the last m positions; used where a
                placeholder stands.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`; images without `input_ids` or from more
                than one source; a number of images that differs from the runs of placeholders or from
                `image_loss_mask`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if sum(source is not None for source in (pixel_values, image_features, mm_encoder_outputs)) > 1:
            raise ValueError("images must come from one of pixel_values, image_features and mm_encoder_outputs")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        elif pixel_values is not None or image_features is not None or mm_encoder_outputs is not None:
            raise ValueError("images are placed by their placeholders in input_ids, but only inputs_embeds was given")

        images = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            images = self.get_image_features(pixel_values, return_dict=True)
        elif image_features is not None:
            images = self._project(image_features)

        positions = None
        if images is not None:
            written = generated_features.shape[1] if generated_features is not None else 0
            prompt_ids = input_ids[:, : input_ids.shape[1] - written]
            positions = ImagePositions.find(prompt_ids, self.config.image_token_id)
            self._check_images(positions, images.pooler_output)
            if image_loss_mask is not None and image_loss_mask.shape != images.pooler_output.shape[:1]:
                raise ValueError(
                    f"image_loss_mask has shape {tuple(image_loss_mask.shape)}: expected one bool for each of the "
                    f"{images.pooler_output.shape[0]} images"
                )
            states = images.pooler_output
            if feature_noise:
                states = self.projector(_with_noise(images.last_hidden_state, feature_noise))
            read = self._is_read(positions, image_loss_mask)
            spliced = _splice(inputs_embeds[:, : prompt_ids.shape[1]], states, positions, read)
            inputs_embeds = (
                torch.cat([spliced, inputs_embeds[:, prompt_ids.shape[1] :]], dim=1) if written else spliced
            )

        if generated_features is not None and generated_features.shape[1]:
            states = self.projector(generated_features.to(self.projector.weight.dtype))
            start = input_ids.shape[1] - states.shape[1]
            is_image = (input_ids[:, start:] == self.config.image_token_id).unsqueeze(-1)
            tail = torch.where(is_image, states.to(inputs_embeds.dtype), inputs_embeds[:, start:])
            inputs_embeds = torch.cat([inputs_embeds[:, :start], tail], dim=1)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return PumaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_features=images.last_hidden_state if images is not None else None,
            image_positions=positions,
        )

    def _check_images(self, positions: ImagePositions, images: torch.Tensor):
        runs = positions.image[-1, -1] + 1
        torch_compilable_check(
            runs == images.shape[0],
            lambda: f"the text holds {int(runs)} images, but {images.shape[0]} were given",
        )
        torch_compilable_check(
            torch.where(positions.mask, positions.offset, 0).max() < images.shape[1],
            lambda: f"a run of image placeholders is longer than the {images.shape[1]} tokens of an image",
        )


class PumaForConditionalGeneration(PumaPreTrainedModel, PumaGenerationMixin):
    """PUMA's language model with its text head and its image head (report section 3.3)."""

    # The loss takes two counts of its own, not the Trainer's `num_items_in_batch`.
    accepts_loss_kwargs = False
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: PumaConfig):
        super().__init__(config)
        self.model = PumaModel(config)
        self.image_head = nn.Linear(config.text_config.hidden_size, config.vision_config.hidden_size)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        # Backbones differ in the name of their embedding (`embed_tokens`, `wte`, ..).
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        # Stock text generation must not open an image that nothing would fill; `generate_interleaved` lifts this.
        self.generation_config = GenerationConfig.from_model_config(config)
        self.generation_config.suppress_tokens = self._image_token_ids()
        self.post_init()

    def _image_token_ids(self) -> list[int]:
        return [self.config.image_start_token_id, self.config.image_end_token_id, self.config.image_token_id]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def encode_image(self, pixel_values: torch.Tensor) -> dict[int, torch.Tensor]:
        """(n, 3, height, width) -> `{scale: (n, k_scale, C)}`, see `PumaModel.encode_image`."""
        return self.model.encode_image(pixel_values)

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """See `PumaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values=pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        image_loss_mask: torch.Tensor | None = None,
        num_text_items: torch.Tensor | int | None = None,
        num_image_items: torch.Tensor | int | None = None,
        image_features: torch.Tensor | None = None,
        feature_noise: float = 0.0,
        generated_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        logits_to_keep: int = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PumaCausalLMOutputWithPast:
        """See `PumaModel.forward` for the sequence and its images.

        Args:
            labels: (B, T) supervised text tokens, -100 elsewhere. Without labels nothing is supervised.
            image_loss_mask: (n,) bool, images that are regression targets; without it none is.
            num_text_items, num_image_items: supervised text and image tokens of the global batch, the two
                denominators of the loss; by default those of this batch.
            logits_to_keep: logits for the last that many positions only; 0 for all.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_features=image_features,
            image_loss_mask=image_loss_mask,
            feature_noise=feature_noise,
            generated_features=generated_features,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits = self.lm_head(hidden_states[:, -logits_to_keep:])

        result = PumaCausalLMOutputWithPast(
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_features=outputs.image_features,
        )
        if generated_features is not None:
            result.next_image_feature = self.image_head(hidden_states[:, -1])
        if labels is not None:
            result.text_loss = text_loss(logits, labels, num_text_items)
            result.image_loss, result.scale_losses = self._image_loss(outputs, image_loss_mask, num_image_items)
            result.loss = (
                self.config.text_loss_weight * result.text_loss + self.config.image_loss_weight * result.image_loss
            )
        return result

    def _image_loss(
        self,
        outputs: PumaModelOutputWithPast,
        image_loss_mask: torch.Tensor | None,
        num_items: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Regression loss of the images to be written: the state before each of their positions predicts its
        feature."""
        hidden_states, positions = outputs.last_hidden_state, outputs.image_positions
        supervised = torch.zeros(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        if positions is not None and image_loss_mask is not None and len(image_loss_mask):
            supervised = (
                positions.mask & image_loss_mask.to(hidden_states.device, torch.bool)[positions.image.clamp(min=0)]
            )
        predicted = self.image_head(hidden_states[:, :-1][supervised[:, 1:]])
        scales = scale_of_position(self.config.tokens_per_scale).to(hidden_states.device)
        if not len(predicted):
            scales, target = scales[:0], predicted.detach()
        else:
            offset = positions.offset[supervised]
            scales, target = scales[offset], outputs.image_features[positions.image[supervised], offset]
        weights = torch.tensor(self.config.scale_loss_weights, dtype=torch.float32, device=hidden_states.device)
        loss = image_loss(predicted, target, scales, weights, num_items)

        error = squared_error(predicted.detach(), target)
        per_scale = torch.zeros_like(weights).index_add(0, scales, error)
        return loss, per_scale / torch.bincount(scales, minlength=len(weights))


def _splice(
    inputs_embeds: torch.Tensor, states: torch.Tensor, positions: ImagePositions, read: torch.Tensor
) -> torch.Tensor:
    """Image states (n, S, H) in place of the embeddings (B, T, H) where `read` (B, T) holds; static shapes
    throughout."""
    flat = (positions.image * states.shape[1] + positions.offset).clamp(0, states.shape[0] * states.shape[1] - 1)
    gathered = states.flatten(0, 1)[flat].to(inputs_embeds.device, inputs_embeds.dtype)
    return torch.where(read.unsqueeze(-1), gathered, inputs_embeds)


def _with_noise(features: torch.Tensor, feature_noise: float) -> torch.Tensor:
    """Features (n, S, C) with white noise of a strength drawn for each image, up to `feature_noise` channel
    deviations."""
    strength = feature_noise * torch.rand(features.shape[0], 1, 1, device=features.device, dtype=features.dtype)
    return features + strength * features.std(dim=(0, 1), keepdim=True) * torch.randn_like(features)
