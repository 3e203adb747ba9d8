"""LoRA on the backbone, with what no backbone had before PUMA trained in full: projector, image head, image queries,
new tokens."""

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..boxes_puma import IMAGE_TOKEN, location_token
from ..modeling_puma import PumaForConditionalGeneration
from ..processing_puma import IMAGE_END_TOKEN, IMAGE_START_TOKEN, PumaProcessor

# For `llm_int8_skip_modules` of a `BitsAndBytesConfig` (QLoRA): encoder, projector and heads stay as they are. They
# are small, and the encoder's features are the targets. Patterns hold from the start of a name, hence the dots.
UNQUANTIZED = [r".*vision_tower", r".*projector", r".*image_head", r".*lm_head"]


def puma_token_ids(processor: PumaProcessor) -> list[int]:
    """Ids of the tokens that `add_puma_tokens` gave the tokenizer, 227 with 224 location tokens."""
    locations = map(location_token, range(processor.num_location_tokens))
    return processor.tokenizer.convert_tokens_to_ids([IMAGE_START_TOKEN, IMAGE_END_TOKEN, IMAGE_TOKEN, *locations])


def puma_lora_config(model: PumaForConditionalGeneration, token_ids: list[int], **options) -> LoraConfig:
    """The adapter's settings; `peft.get_peft_model(model, ...)` then makes the model that `PumaTrainer` takes.

    Args:
        model: whose backbone the adapter is for.
        token_ids: rows of the embedding and of the text head that are trained, from `puma_token_ids`; the adapter
            holds these rows only. An empty list keeps both as they are.
        options: of `LoraConfig` (`r`, `lora_alpha`, ..); `target_modules` (by default all linear layers of the
            language model), `exclude_modules` (by default the encoder) and `modules_to_save` (by default projector,
            image head and, where the model has them, image queries) win over what is set here.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = [name.rsplit(".", 1)[-1] for name, module in model.named_modules() if module in (embedding, head)]
    queries = [] if model.config.image_decoding == "autoregressive" else ["image_queries"]
    language_model = model.model.language_model
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in language_model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    settings = {
        "task_type": "CAUSAL_LM",
        # A pattern, not PEFT's "all-linear": that becomes a list of names, which adapters with a pattern, as this one
        # always had, cannot be combined with (`add_weighted_adapter`).
        "target_modules": rf".*language_model\..*\.({'|'.join(sorted(linear))})",
        "exclude_modules": r".*vision_tower\..*",  # has layers of the same names as some that options may name
        "modules_to_save": ["projector", "image_head", *queries],
        "trainable_token_indices": {name: token_ids for name in names} if token_ids else None,
    }
    return LoraConfig(**(settings | options))
