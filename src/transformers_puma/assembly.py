"""A trainable PUMA from a pretrained language model and a pretrained encoder. Trains nothing itself.

Both are taken as they are. What no pretrained model has is new: the projector, the image head, and the rows of PUMA's
tokens in the vocabulary.
"""

import copy
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import PROCESSOR_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, has_file

from puma_files import read_safetensors_header, shard_files, unreadable

from .backbone_checks import require_plain_decoder
from .configuration_puma import PumaConfig
from .granularity import encoder_tokens_per_scale
from .image_processing_puma import PumaImageProcessor
from .modeling_puma import PumaForConditionalGeneration
from .open_clip_vision import load_open_clip
from .processing_puma import PumaProcessor, add_puma_tokens

OPEN_CLIP = "open_clip:"
VOCABULARY_MULTIPLE = 64
MAX_ANSWER_TOKENS = 128
VISION_TOWER = {r"^model\.vision_tower\.": ""}


def require_language_model(name: str) -> None:
    """Raises, without reading any weight, what `load_language_model` would of a model of another kind."""
    config = _read_config(name)
    expected = "expected a decoder-only language model"
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model ({config.model_type}): {expected}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{name} is of type {config.model_type}, which writes no text: {expected}")
    if config.get_text_config() is not config:
        raise ValueError(f"{name} ({config.model_type}) reads more than text: {expected}, its text part alone")
    _require_whole_weights(name)


def load_language_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained decoder-only language model, in its own number format, and its tokenizer.

    Args:
        name: a folder, or an id on the Hub.

    Raises:
        ValueError: not a decoder-only model of text, weights or a tokenizer that are incomplete or unreadable, or
            logits that are more than one Linear of the last hidden state, which is what PUMA computes.
        OSError: no such folder or id.
    """
    require_language_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except OSError:
        raise
    except Exception as error:
        # tokenizers has no exception of its own.
        raise ValueError(f"the tokenizer of {name} cannot be read: {unreadable(error)}") from error
    language_model = _load(AutoModelForCausalLM, name)
    require_plain_decoder(name, language_model)
    return language_model, tokenizer


def require_encoder(name: str) -> None:
    """Raises, without reading any weight, what `load_encoder` would of a model of another kind."""
    if name.startswith(OPEN_CLIP):
        if not all(_open_clip_names(name)):
            raise ValueError(f"{name!r} must be {OPEN_CLIP}ARCH/TAG, such as {OPEN_CLIP}ViT-L-14/openai")
        return
    model_type = _read_config(name).model_type
    if model_type not in ("puma", "clip", "clip_vision_model"):
        raise ValueError(f"{name} is of type {model_type}: expected a CLIP encoder")
    _require_whole_weights(name)


def load_encoder(name: str) -> tuple[CLIPVisionModel, PumaImageProcessor]:
    """A pretrained CLIP image encoder, and PUMA's preprocessing with the mean and deviation that it was trained with.

    Args:
        name: a folder, or an id on the Hub, of a CLIP vision model, a whole CLIP, or a PUMA; or `open_clip:ARCH/TAG`,
            see `load_open_clip`.

    Raises:
        ValueError: another kind of model, or weights that are incomplete or unreadable.
        OSError: no such folder or id.
    """
    require_encoder(name)
    if name.startswith(OPEN_CLIP):
        return load_open_clip(*_open_clip_names(name))
    config = _read_config(name)
    # Of a PUMA only the encoder's weights are read.
    inside = {"config": config.vision_config, "key_mapping": VISION_TOWER} if config.model_type == "puma" else {}
    vision = _load(CLIPVisionModel, name, **inside)
    return vision, _load_image_processor(name, vision.config.image_size)


def _open_clip_names(name: str) -> tuple[str, str]:
    arch, _, tag = name.removeprefix(OPEN_CLIP).partition("/")
    return arch, tag


def _load_image_processor(name: str, image_size: int) -> PumaImageProcessor:
    files = ("preprocessor_config.json", PROCESSOR_NAME)
    size = {"height": image_size, "width": image_size}
    if not any(has_file(name, file) for file in files):
        return PumaImageProcessor(size=size)
    published = CLIPImageProcessorPil.from_pretrained(name)
    return PumaImageProcessor(size=size, image_mean=published.image_mean, image_std=published.image_std)


def assemble_puma(
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vision: CLIPVisionModel,
    image_processor: PumaImageProcessor,
) -> tuple[PumaForConditionalGeneration, PumaProcessor]:
    """Joins a language model and an encoder; takes them over and changes them in place.

    The tokenizer gets PUMA's tokens. Embeddings and text head grow to a multiple of 64 rows; a new row is drawn from
    the distribution of the old ones, as transformers does it. There are as many scales as the encoder's grid can be
    halved for, at most five. All takes the number format of the language model, whose weights are not copied.
    """
    add_puma_tokens(tokenizer)
    # Some models have more rows than their tokenizer has tokens; those are not cut off.
    rows = max(len(tokenizer), language_model.get_input_embeddings().num_embeddings)
    language_model.resize_token_embeddings(rows, pad_to_multiple_of=VOCABULARY_MULTIPLE)
    processor = PumaProcessor(image_processor, tokenizer)
    config = PumaConfig(
        text_config=_as_part(language_model.config),
        vision_config=_as_part(vision.config),
        num_scales=len(encoder_tokens_per_scale(vision.config)),
        image_start_token_id=processor.image_start_token_id,
        image_end_token_id=processor.image_end_token_id,
        image_token_id=processor.image_token_id,
    )
    processor.image_seq_length = config.image_seq_length

    with torch.device("meta"):
        model = PumaForConditionalGeneration(config)
    model.model.language_model = language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    model.model.vision_tower = vision.to(language_model.dtype)
    for new in (model.model.projector, model.image_head):
        new.to_empty(device="cpu")
        model._init_weights(new)
        new.to(language_model.dtype)
    model.generation_config = _generation_config(model, tokenizer, language_model.generation_config)
    return model.eval(), processor


def _as_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy without what describes the model that it came from: its class and its place on this computer."""
    config = copy.deepcopy(config)
    config.architectures, config._name_or_path = None, ""
    return config


def _generation_config(
    model: PumaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, source: GenerationConfig
) -> GenerationConfig:
    """PUMA's, which samples nothing, with all tokens that end a text of the language model."""
    config = copy.deepcopy(model.generation_config)
    ends = source.eos_token_id if isinstance(source.eos_token_id, list) else [source.eos_token_id]
    config.eos_token_id = sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})
    config.bos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    # An answer is a sentence or two; the default of transformers would cut it off after 20 tokens.
    config.max_new_tokens = source.max_new_tokens or MAX_ANSWER_TOKENS
    return config


def _read_config(name: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name)
    except StrictDataclassError as error:
        raise ValueError(f"the config of {name} describes no model: {unreadable(error)}") from error


def _require_whole_weights(name: str) -> None:
    """Raises, of a folder whose safetensors weights are cut off or mere pointers, an error that names the file."""
    whole, index = Path(name, SAFE_WEIGHTS_NAME), Path(name, SAFE_WEIGHTS_INDEX_NAME)
    for file in [whole] if whole.is_file() else shard_files(index) if index.is_file() else []:
        read_safetensors_header(file)


def _load(model_class: Any, name: str, **arguments: Any) -> PreTrainedModel:
    """A pretrained model in evaluation mode; raises `ValueError` unless it has all of its weights."""
    try:
        # What does not fit is reported below, since the error for it names no weight.
        model, info = model_class.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    except (SafetensorError, UnpicklingError, RuntimeError) as error:
        raise ValueError(f"the weights of {name} cannot be read: {unreadable(error)}") from error
    if info["mismatched_keys"]:
        key, found, expected = min(info["mismatched_keys"])
        raise ValueError(
            f"the weights of {name} do not fit its config: {key} has shape {tuple(found)}, not {tuple(expected)}"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"the weights of {name} lack {len(missing)} entries, such as {missing[0]}")
    return model.eval()
