"""Real classes at tiny sizes: five scales of a 16 x 16 grid, pictures of 16 x 16 pixels."""

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

from diffusers_puma import PumaPipeline, PumaUNet2DConditionModel
from transformers_puma import (
    PumaConfig,
    PumaForConditionalGeneration,
    PumaImageProcessor,
    PumaProcessor,
    add_puma_tokens,
    tokens_per_scale,
)

TOKENS = tokens_per_scale(16, 5)
LAYERS = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 2, **LAYERS}


def make_unet(scale: int) -> PumaUNet2DConditionModel:
    torch.manual_seed(10 + scale)
    return PumaUNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
        encoder_hid_dim=32,
        encoder_hid_dim_type="text_proj",
        num_tokens=TOKENS[scale],
        use_position_table=scale == 0,
    ).eval()


def make_decoder_components() -> dict:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.3,
        force_upcast=True,
    ).eval()
    decoders = {f"unet_{scale}": make_unet(scale) for scale in range(5)}
    return {"vae": vae, "scheduler": DDPMScheduler(beta_schedule="scaled_linear"), **decoders}


def make_processor() -> PumaProcessor:
    """A tokenizer of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    add_puma_tokens(tokenizer, num_location_tokens=4)
    image_processor = PumaImageProcessor(size={"height": 32, "width": 32})
    return PumaProcessor(image_processor, tokenizer, image_seq_length=sum(TOKENS), num_location_tokens=4)


def make_language_model(processor: PumaProcessor, **options) -> PumaForConditionalGeneration:
    torch.manual_seed(1)
    config = PumaConfig(
        text_config={"model_type": "llama", "vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1, **LAYERS},
        vision_config=VISION,
        num_location_tokens=4,
        image_start_token_id=processor.image_start_token_id,
        image_end_token_id=processor.image_end_token_id,
        image_token_id=processor.image_token_id,
        **options,
    )
    return PumaForConditionalGeneration(config).eval()


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def draw(pipe: PumaPipeline, *args, seed: int | list[int] = 0, **kwargs) -> torch.Tensor | dict[int, torch.Tensor]:
    generator = seeds(seed)[0] if isinstance(seed, int) else seeds(*seed)
    return pipe(*args, generator=generator, output_type="pt", **kwargs).images


def count_calls(module: torch.nn.Module) -> list[tuple]:
    """Grows by the shape of the first input at each call of `module`."""
    shapes: list[tuple] = []
    module.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape) if args else None))
    return shapes


@pytest.fixture
def decoder_pipeline() -> PumaPipeline:
    """Five decoders and an image encoder, no language model; 3 DDPM steps."""
    components = make_decoder_components()
    torch.manual_seed(1)
    encoder = CLIPVisionModel(CLIPVisionConfig(**{k: v for k, v in VISION.items() if k != "model_type"})).eval()
    pipe = PumaPipeline(**components, image_encoder=encoder, default_num_inference_steps=3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def full_pipeline() -> PumaPipeline:
    """Five decoders and a language model; 3 DDPM steps."""
    processor = make_processor()
    pipe = PumaPipeline(
        **make_decoder_components(),
        mllm=make_language_model(processor),
        processor=processor,
        default_num_inference_steps=3,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pictures() -> list[Image.Image]:
    """Three pictures of different sizes and contents."""
    gradient = Image.linear_gradient("L")
    return [
        Image.merge("RGB", [gradient, gradient.rotate(90), gradient.rotate(180)]).resize((40, 30)),
        Image.radial_gradient("L").convert("RGB").resize((32, 32)),
        Image.new("RGB", (20, 50), (200, 30, 90)),
    ]
