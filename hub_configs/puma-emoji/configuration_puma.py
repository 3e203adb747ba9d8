"""Configuration of PUMA: a decoder-only language model, a CLIP vision encoder, and the scales between them."""

import math

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, DynamicCache, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from .granularity import tokens_per_scale
from .image_decoding_puma import IMAGE_DECODINGS

IMAGE_HEADS = ("regression", "flow")

# LLaMA-3 8B with PUMA's rows appended to the vocabulary: 128256 + 227 added tokens, padded to a multiple of 64.
LLAMA3_8B = {
    "model_type": "llama",
    "vocab_size": 128512,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
CLIP_L14 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
}


@strict
class PumaConfig(PreTrainedConfig):
    """Configuration of `PumaModel` and `PumaForConditionalGeneration`. Without arguments: the report's 8B model.

    Indexes of lists over scales are the scale: 0 is the finest, `num_scales - 1` the coarsest.

    Args:
        text_config: configuration (or its dict) of any decoder-only model of transformers.
        vision_config: configuration (or its dict) of a CLIP vision model; its patch grid is scale 0.
        num_scales: granularities, each pooled from the finer one (report equation 1).
        scale_loss_weights: alpha per scale in the regression loss (report equation 2); by default the report's
            1, 8, 64, 512, 1024 as far as there are scales.
        text_loss_weight, image_loss_weight: weights of the two parts of the loss.
        num_location_tokens: `<loc_i>` tokens that a box coordinate is quantised to.
        input_scales: scales that the model reads of an image that it is given (report table 5); None is all.
        image_decoding: how an image is written: `"autoregressive"`, feature by feature as in the report;
            `"next_scale"`, all features of a scale at once from the coarser scales; `"prefilled"`, all features at
            once from learned queries. See `image_decoding_puma`.
        image_head: `"regression"` as in the report, or `"flow"`: features are samples, not means.
        flow_width, flow_num_layers: size of the flow's network; by default as wide as the language model.
        flow_num_steps: Euler steps from noise to a feature.
        image_token_id: placeholder at each image position.
        image_start_token_id, image_end_token_id: `[IMG]` and `[/IMG]`.

    Raises:
        ValueError: inconsistent values; the message names the field.
    """

    model_type = "puma"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    # What an evaluation by the Trainer does not gather: of the outputs, only logits have one row for each of a batch.
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",
        "text_loss",
        "image_loss",
        "scale_losses",
        "predicted_features",
        "image_features",
    ]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    num_scales: int = 5
    scale_loss_weights: list[int | float] | tuple[int | float, ...] | None = None
    text_loss_weight: float | int = 0.02
    image_loss_weight: float | int = 1.0
    num_location_tokens: int = 224
    input_scales: list[int] | tuple[int, ...] | None = None
    image_decoding: str = "autoregressive"
    image_head: str = "regression"
    flow_width: int | None = None
    flow_num_layers: int = 3
    flow_num_steps: int = 10
    image_start_token_id: int = 128256
    image_end_token_id: int = 128257
    image_token_id: int = 128258
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.text_config = _sub_config("text_config", self.text_config, LLAMA3_8B)
        self.vision_config = _sub_config("vision_config", self.vision_config, CLIP_L14)
        if self.scale_loss_weights is None:
            self.scale_loss_weights = [1, 8, 64, 512, 1024][: self.num_scales]
        self.scale_loss_weights = list(self.scale_loss_weights)
        self.input_scales = None if self.input_scales is None else list(self.input_scales)
        # Saved with the text configuration by every backbone, read at the top level by the tying of weights.
        tied = getattr(self.text_config, "tie_word_embeddings", False)
        self.tie_word_embeddings = self.tie_word_embeddings or bool(tied)
        super().__post_init__(**kwargs)
        self._validate_puma()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers, which sets overrides after the rest was found to be consistent."""
        result = super().from_dict(config_dict, **kwargs)
        (result[0] if isinstance(result, tuple) else result)._validate_puma()
        return result

    def save_pretrained(self, *args, **kwargs):
        """As in transformers; what was edited since and could not be loaded again is an error."""
        self._validate_puma()
        return super().save_pretrained(*args, **kwargs)

    def _validate_puma(self):
        # Not in `validate_*` methods, which `@strict` calls by itself: it wraps their errors in one that is no
        # ValueError.
        if self.text_config.is_encoder_decoder:
            raise ValueError(f"text_config is of an encoder-decoder ({self.text_config.model_type}), not decoder-only")
        if self.text_config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
            self.text_config, "is_decoder", False
        ):
            raise ValueError(f"text_config is of an encoder ({self.text_config.model_type}), not decoder-only")
        if not hasattr(self.text_config, "vocab_size"):
            raise ValueError(f"text_config is of a model without a vocabulary ({self.text_config.model_type})")
        if self.text_config.get_text_config() is not self.text_config:
            raise ValueError(
                f"text_config is of a model of several parts ({self.text_config.model_type}): give its text part"
            )
        if getattr(self.text_config, "output_router_logits", False):
            raise ValueError(
                "text_config: output_router_logits=True asks for a loss that balances experts, which PUMA does not "
                "have: expected False"
            )
        if self.vision_config.model_type != CLIP_L14["model_type"]:
            raise ValueError(f"vision_config is of type {self.vision_config.model_type}, not of a CLIP vision model")
        if self.num_location_tokens < 0:
            raise ValueError(f"num_location_tokens={self.num_location_tokens} must not be negative")
        weights = self.text_loss_weight, self.image_loss_weight, *self.scale_loss_weights
        if not all(0 <= weight < math.inf for weight in weights):
            raise ValueError(
                f"text_loss_weight={weights[0]}, image_loss_weight={weights[1]} and scale_loss_weights="
                f"{self.scale_loss_weights} must be finite and must not be negative"
            )
        if self.vision_config.image_size % self.vision_config.patch_size:
            raise ValueError(
                f"vision_config: image_size={self.vision_config.image_size} is not a multiple of "
                f"patch_size={self.vision_config.patch_size}"
            )
        tokens_per_scale(self.grid_size, self.num_scales)
        if len(self.scale_loss_weights) != self.num_scales:
            raise ValueError(
                f"scale_loss_weights={self.scale_loss_weights} must hold one weight for each of "
                f"num_scales={self.num_scales}"
            )
        for field, known in (("image_decoding", IMAGE_DECODINGS), ("image_head", IMAGE_HEADS)):
            if getattr(self, field) not in known:
                raise ValueError(f"{field}={getattr(self, field)!r} must be one of {', '.join(known)}")
        if self.image_decoding == "next_scale" and any(
            getattr(layer, "is_sliding", True) for layer in DynamicCache(config=self.text_config).layers
        ):
            raise ValueError(
                "image_decoding='next_scale' has no mask for the sliding windows or linear attention of text_config "
                f"({self.text_config.model_type}): use 'autoregressive', or a text_config without them"
            )
        if self.flow_width is not None and (self.flow_width < 2 or self.flow_width % 2):
            raise ValueError(f"flow_width={self.flow_width} must be an even number from 2, or None")
        for field in ("flow_num_layers", "flow_num_steps"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")
        scales, known = self.input_scales, set(range(self.num_scales))
        if scales is not None and (not scales or len(known.intersection(scales)) < len(scales)):
            raise ValueError(f"input_scales={self.input_scales} must name scales 0..{self.num_scales - 1}, each once")
        ids = {}
        for field in ("image_token_id", "image_start_token_id", "image_end_token_id"):
            token_id = getattr(self, field)
            if not 0 <= token_id < self.text_config.vocab_size:
                raise ValueError(f"{field}={token_id} is outside the vocabulary of {self.text_config.vocab_size}")
            if token_id in ids:
                raise ValueError(f"{field}={token_id} is the same as {ids[token_id]}")
            ids[token_id] = field

    @property
    def grid_size(self) -> int:
        """Side of the scale-0 grid, in tokens."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def tokens_per_scale(self) -> list[int]:
        """Token counts k_0..k_N, finest first: `[256, 64, 16, 4, 1]`."""
        return tokens_per_scale(self.grid_size, self.num_scales)

    @property
    def image_seq_length(self) -> int:
        """Positions that one image takes between `[IMG]` and `[/IMG]`: 341."""
        return sum(self.tokens_per_scale)


def _sub_config(field: str, config: dict | PreTrainedConfig | None, default: dict) -> PreTrainedConfig:
    if config is None:
        config = default
    if isinstance(config, dict):
        config = dict(config)
        model_type = config.pop("model_type", default["model_type"])
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"{field}: transformers knows no model_type {model_type!r}")
        config = CONFIG_MAPPING[model_type](**config)
    return config
