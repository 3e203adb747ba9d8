"""The report's sizes: each part of `hub_configs/puma-8b`, built on the meta device, against the stock classes."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPVisionModel, GenerationConfig, LlamaForCausalLM

from diffusers_puma import PumaPipeline, PumaUNet2DConditionModel
from transformers_puma import PumaConfig, PumaForConditionalGeneration, PumaImageProcessor

FOLDER = Path(__file__).parents[1] / "hub_configs" / "puma-8b"
# What the published models are known to have.
LLAMA3_8B, CLIP_L14, SDXL_UNET, SDXL_VAE = 8_030_261_248, 303_179_776, 2_567_463_684, 83_653_863
SDXL_TEXT_EMBEDDING = (2816 * 1280 + 1280) + (1280 * 1280 + 1280)

Shapes = dict[str, tuple[int, ...]]


def shapes(module: torch.nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def below(prefix: str, found: Shapes) -> Shapes:
    return {name.removeprefix(prefix): shape for name, shape in found.items() if name.startswith(prefix)}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def read(file: str) -> dict:
    return json.loads((FOLDER / file).read_text())


def build_unet(scale: int) -> PumaUNet2DConditionModel:
    with torch.device("meta"):
        return PumaUNet2DConditionModel.from_config(PumaUNet2DConditionModel.load_config(FOLDER / f"unet_{scale}"))


@pytest.fixture(scope="module")
def mllm() -> PumaForConditionalGeneration:
    with torch.device("meta"):
        return PumaForConditionalGeneration(PumaConfig.from_pretrained(FOLDER / "mllm"))


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL.from_config(AutoencoderKL.load_config(FOLDER / "vae"))


@pytest.fixture(scope="module")
def stock_unet() -> UNet2DConditionModel:
    """SDXL's UNet as published, but for what its cross-attention and its embedding read."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            encoder_hid_dim=1024,
            encoder_hid_dim_type="text_proj",
        )


@pytest.mark.parametrize("folder", [FOLDER, FOLDER / "mllm"])
def test_config_is_the_default(folder):
    def values(config: PumaConfig) -> dict:
        return {name: value for name, value in config.to_dict().items() if name not in ("architectures", "auto_map")}

    assert values(PumaConfig.from_pretrained(folder)) == values(PumaConfig())


def test_language_model(mllm):
    config = mllm.config
    with torch.device("meta"):
        llama, clip = LlamaForCausalLM(config.text_config), CLIPVisionModel(config.vision_config)
    assert count(llama) == LLAMA3_8B + 2 * (128512 - 128256) * 4096
    assert count(clip) == CLIP_L14

    found = shapes(mllm)
    expected = {name.replace("model.", "model.language_model.", 1): shape for name, shape in shapes(llama).items()}
    expected |= {f"model.vision_tower.{name}": shape for name, shape in shapes(clip).items()}
    expected |= {"model.projector.weight": (4096, 1024), "model.projector.bias": (4096,)}
    expected |= {"image_head.weight": (1024, 4096), "image_head.bias": (1024,)}
    assert found == expected
    assert count(mllm) == count(llama) + count(clip) + 2 * 1024 * 4096 + 4096 + 1024
    assert config.tokens_per_scale == [256, 64, 16, 4, 1] and config.image_seq_length == 341


@pytest.mark.parametrize("scale", range(5))
def test_decoder(scale, stock_unet):
    decoder = build_unet(scale)
    table = {"position_table": (1, 256, 2048)} if scale == 0 else {}
    assert shapes(decoder) == shapes(stock_unet) | table
    assert count(decoder) == count(stock_unet) + (256 * 2048 if scale == 0 else 0)
    assert count(stock_unet) == SDXL_UNET - SDXL_TEXT_EMBEDDING + 1024 * 2048 + 2048
    assert decoder.config.num_tokens == [256, 64, 16, 4, 1][scale]
    stock_config, config = json.loads(stock_unet.to_json_string()), read(f"unet_{scale}/config.json")
    assert {name for name in stock_config if not name.startswith("_") and config[name] != stock_config[name]} == set()


def test_vae(vae):
    assert count(vae) == SDXL_VAE
    assert vae.config.scaling_factor == 0.13025 and vae.config.force_upcast


def test_parts_fit_each_other(mllm, vae):
    """`PumaPipeline` refuses decoders that do not take what the encoder gives."""
    scheduler = DDPMScheduler.from_pretrained(FOLDER / "scheduler")
    decoders = {f"unet_{scale}": build_unet(scale) for scale in range(5)}
    pipe = PumaPipeline(mllm=mllm, vae=vae, scheduler=scheduler, **decoders)
    assert pipe.scales == [0, 1, 2, 3, 4]
    # 1024 x 1024 pixels.
    assert pipe.unet_0.config.sample_size * pipe.vae_scale_factor == 1024 == vae.config.sample_size
    index = {name: value for name, value in pipe.config.items() if not name.startswith("_") and name != "processor"}
    assert index == {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in read("model_index.json").items()
        if name in index
    }


def test_processor_fits_the_model():
    config = PumaConfig()
    for folder in (FOLDER, FOLDER / "processor"):
        processor = json.loads((folder / "processor_config.json").read_text())
        assert processor["image_seq_length"] == config.image_seq_length
        assert processor["num_location_tokens"] == config.num_location_tokens
        image_processor = PumaImageProcessor.from_pretrained(folder)
        assert image_processor.to_dict() == PumaImageProcessor().to_dict()
        assert image_processor.size["height"] == config.vision_config.image_size


def test_generation_config_is_the_models(mllm):
    for folder in (FOLDER, FOLDER / "mllm"):
        config = GenerationConfig.from_pretrained(folder)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "do_sample"):
            assert getattr(config, name) == getattr(mllm.generation_config, name), name


def test_layout_is_a_saved_model_folder_without_weights():
    assert {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file()} == {
        *("README.md", "config.json", "generation_config.json", "model_index.json", "processor_config.json"),
        *("mllm/config.json", "mllm/generation_config.json", "processor/processor_config.json"),
        *("scheduler/scheduler_config.json", "vae/config.json"),
        *(f"unet_{scale}/config.json" for scale in range(5)),
    }
    assert read("config.json") == read("mllm/config.json")


def test_model_card_tells_the_measured_sizes(mllm, vae):
    card = (FOLDER / "README.md").read_text()
    language_model = count(mllm.model.language_model) + count(mllm.lm_head)
    heads = count(mllm.model.projector) + count(mllm.image_head)
    sizes = [
        language_model,
        count(mllm.model.vision_tower),
        heads,
        count(build_unet(0)),
        count(build_unet(1)),
        count(vae),
    ]
    assert all(f"{size:,}" in card for size in sizes)
    assert "There are no weights here" in card and "https://arxiv.org/abs/2410.13861" in card
