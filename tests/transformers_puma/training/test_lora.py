"""An adapter alone: saved, loaded, merged, switched."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open

from transformers_puma import PumaForConditionalGeneration
from transformers_puma.training import (
    PumaDataCollator,
    PumaTrainer,
    PumaTrainingArguments,
    puma_lora_config,
    puma_token_ids,
)

from ..conftest import TEXT, make_model, make_picture

ROW = {"prompt": "a cat <image>", "completion": "here <image>", "images": [make_picture(0), make_picture(1)]}


@pytest.fixture(scope="module")
def adapters(processor, tmp_path_factory):
    """Two adapters of one base, trained for a few steps, with the losses that they reach on `ROW`."""
    folders = {}
    for i, rate in enumerate((1e-2, 3e-2)):
        folder = tmp_path_factory.mktemp("adapter")
        base = make_model(processor)
        model = get_peft_model(base, puma_lora_config(base, puma_token_ids(processor), r=2))
        arguments = PumaTrainingArguments(
            str(folder),
            max_steps=2 + i,
            learning_rate=rate,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = PumaTrainer(model, arguments, data_collator=PumaDataCollator(processor), train_dataset=[ROW] * 8)
        trainer.train()
        trainer.save_model()
        folders[folder] = outputs(model, processor)
    return folders


@torch.no_grad()
def outputs(model, processor) -> list[torch.Tensor]:
    """Logits and losses, which depend on all that an adapter may hold."""
    model.eval()
    batch = PumaDataCollator(processor)([ROW])
    result = model(**batch)
    return [result.logits, result.text_loss, result.image_loss]


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_holds_nothing_of_the_encoder_or_of_other_tokens(adapters, processor):
    for folder in adapters:
        assert not (folder / "model.safetensors").exists()
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        assert not any("vision_tower" in name for name in shapes)
        for part in ("projector.weight", "image_head.weight", "q_proj.lora_A.weight", "down_proj.lora_B.weight"):
            assert any(name.endswith(part) for name in shapes), part
        tokens = [shape for name, shape in shapes.items() if "trainable_tokens_delta" in name]
        assert tokens == [[len(puma_token_ids(processor)), TEXT["hidden_size"]]] * 2


def test_an_adapter_is_loaded_onto_its_base(adapters, processor):
    for folder, expected in adapters.items():
        assert_same(outputs(PeftModel.from_pretrained(make_model(processor), folder), processor), expected)


def test_adapters_are_switched(adapters, processor):
    (first, at_first), (second, at_second) = adapters.items()
    model = PeftModel.from_pretrained(make_model(processor), first, adapter_name="first")
    model.load_adapter(second, adapter_name="second")
    for name, expected in (("second", at_second), ("first", at_first)):
        model.set_adapter(name)
        assert_same(outputs(model, processor), expected)
    plain = outputs(make_model(processor), processor)
    with model.disable_adapter():
        assert_same(outputs(model, processor), plain)
    assert abs(at_first[2] - plain[2]) > 1e-2 and abs(at_first[2] - at_second[2]) > 1e-2


def test_a_merged_adapter_is_a_plain_model(adapters, processor, tmp_path):
    folder, expected = next(iter(adapters.items()))
    merged = PeftModel.from_pretrained(make_model(processor), folder).merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = PumaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.state_dict().keys() == make_model(processor).state_dict().keys()
    assert_same(outputs(again, processor), expected)
