"""Real classes at tiny sizes: three scales of a 4 x 4 grid (16 + 4 + 1 = 21 positions), pictures of 16 x 16 pixels."""

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from transformers_puma import (
    PumaConfig,
    PumaForConditionalGeneration,
    PumaImageProcessor,
    PumaProcessor,
    add_puma_tokens,
)

LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, **LAYERS}
TEXT = {
    "model_type": "llama",
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    **LAYERS,
}
NUM_SCALES, IMAGE_LENGTH = 3, 21


def make_processor(num_location_tokens: int = 224) -> PumaProcessor:
    """A tokenizer of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    add_puma_tokens(tokenizer, num_location_tokens)
    image_processor = PumaImageProcessor(size={"height": 16, "width": 16})
    return PumaProcessor(image_processor, tokenizer, IMAGE_LENGTH, num_location_tokens)


def make_config(processor: PumaProcessor, text_config: dict | None = None, **kwargs) -> PumaConfig:
    return PumaConfig(
        text_config={**(text_config or TEXT), "vocab_size": 512},
        vision_config=VISION,
        num_scales=NUM_SCALES,
        image_token_id=processor.image_token_id,
        image_start_token_id=processor.image_start_token_id,
        image_end_token_id=processor.image_end_token_id,
        **kwargs,
    )


def make_model(processor: PumaProcessor, **kwargs) -> PumaForConditionalGeneration:
    torch.manual_seed(0)
    model = PumaForConditionalGeneration(make_config(processor, **kwargs)).eval()
    # Features as far from zero as a real encoder's, so that what is fed back matters.
    if model.config.image_head == "regression":
        torch.nn.init.normal_(model.image_head.weight, std=0.5)
    torch.nn.init.normal_(model.model.projector.weight, std=0.5)
    return model


def make_picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


@pytest.fixture(scope="session")
def processor() -> PumaProcessor:
    return make_processor()


@pytest.fixture(scope="session")
def model(processor) -> PumaForConditionalGeneration:
    return make_model(processor)


@pytest.fixture
def picture() -> Image.Image:
    return make_picture(0)
