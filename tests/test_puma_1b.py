"""`hub_configs/puma-1b`: Llama 3.2 1B's sizes in the language model, all else as in `puma-8b`."""

import json
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from transformers_puma import PumaConfig, PumaForConditionalGeneration

FOLDER = Path(__file__).parents[1] / "hub_configs" / "puma-1b"
PUMA_8B = FOLDER.parent / "puma-8b"
# What the published model is known to have.
LLAMA32_1B, ADDED_ROWS = 1_235_814_400, 128_512 - 128_256


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def mllm() -> PumaForConditionalGeneration:
    with torch.device("meta"):
        return PumaForConditionalGeneration(PumaConfig.from_pretrained(FOLDER))


def test_sizes(mllm):
    text_config = mllm.config.text_config
    assert isinstance(text_config, LlamaConfig) and text_config.rope_parameters["rope_type"] == "llama3"
    assert mllm.lm_head.weight is mllm.get_input_embeddings().weight
    assert count(mllm.model.language_model) == LLAMA32_1B + ADDED_ROWS * 2048
    with torch.device("meta"):
        stock = LlamaForCausalLM(text_config)
    ours = {name: tuple(value.shape) for name, value in mllm.model.language_model.state_dict().items()}
    assert ours == {name: tuple(value.shape) for name, value in stock.model.state_dict().items()}


def test_all_but_the_language_model_is_as_in_puma_8b():
    files = {path.relative_to(FOLDER) for path in FOLDER.rglob("*") if path.is_file()}
    assert files == {path.relative_to(PUMA_8B) for path in PUMA_8B.rglob("*") if path.is_file()}
    own = {"README.md", "config.json", "mllm/config.json"}
    for file in files:
        if str(file) not in own:
            assert (FOLDER / file).read_bytes() == (PUMA_8B / file).read_bytes(), file
    config, other = (json.loads((folder / "config.json").read_text()) for folder in (FOLDER, PUMA_8B))
    differing = {name for name in config | other if config.get(name) != other.get(name)}
    assert differing == {"text_config", "tie_word_embeddings"}
    assert json.loads((FOLDER / "mllm/config.json").read_text()) == config


def test_generation_config_is_the_models(mllm):
    config = GenerationConfig.from_pretrained(FOLDER)
    for name in ("bos_token_id", "eos_token_id", "suppress_tokens"):
        assert getattr(config, name) == getattr(mllm.generation_config, name), name


def test_model_card_tells_the_sizes(mllm):
    card = (FOLDER / "README.md").read_text()
    heads = count(mllm.model.projector) + count(mllm.image_head)
    for size in (count(mllm.model.language_model), count(mllm.model.vision_tower), heads):
        assert f"{size:,}" in card
    assert "There are no weights here" in card
