"""LoRA on the language model: the adapter alone is trained, saved, loaded, merged and switched."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, CLIPVisionConfig
from transformers.pytorch_utils import Conv1D

from transformers_puma import PumaForConditionalGeneration
from transformers_puma.training import (
    PumaDataCollator,
    PumaTrainer,
    PumaTrainingArguments,
    puma_lora_config,
    puma_token_ids,
)
from transformers_puma.training.lora import UNQUANTIZED

from ..conftest import IMAGE_LENGTH, TEXT, VISION, make_config, make_model, make_picture


@pytest.fixture(scope="module")
def rows():
    drawn = {"prompt": "a picture", "completion": "<image>", "images": [make_picture(0)]}
    return [
        drawn,
        {"prompt": "<image>", "completion": "a <box>", "images": [make_picture(1)], "boxes": [(1, 1, 9, 9)]},
    ]


def train(processor, rows, folder, tied: bool = True, seed: int = 0, **options) -> PeftModel:
    model = make_model(processor, text_config={**TEXT, "tie_word_embeddings": tied})
    torch.manual_seed(seed)
    adapted = get_peft_model(model, puma_lora_config(model, puma_token_ids(processor), r=2, **options))
    arguments = PumaTrainingArguments(
        str(folder),
        max_steps=2,
        learning_rate=0.05,
        seed=seed,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = PumaTrainer(adapted, arguments, processing_class=processor, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    return trainer.model.eval()


@pytest.mark.parametrize("model_type", ["llama", "phi3", "starcoder2", "gpt2"])
def test_all_linear_layers_of_the_language_model_are_adapted(processor, model_type):
    text = {**TEXT, "model_type": model_type, "sliding_window": None}
    model = make_model(processor, text_config=text)
    linear = {
        name
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    }
    adapted = get_peft_model(model, puma_lora_config(model, token_ids=[], r=2)).get_base_model()
    found = {name for name, module in adapted.model.language_model.named_modules() if hasattr(module, "lora_A")}
    assert found == linear and len(found) >= 8
    assert not any("lora" in name for name, _ in adapted.model.vision_tower.named_modules())


@pytest.mark.parametrize("target_modules", [["q_proj"], "all-linear"])
def test_the_encoder_is_adapted_only_if_asked_for(processor, target_modules):
    model = make_model(processor)
    options = {"r": 2, "target_modules": target_modules}
    adapted = get_peft_model(model, puma_lora_config(model, [], **options)).get_base_model()
    parts = (adapted.model.language_model, adapted.model.vision_tower)
    assert [any("lora" in name for name, _ in part.named_modules()) for part in parts] == [True, False]
    model = make_model(processor)
    config = puma_lora_config(model, [], **options, exclude_modules=r".*language_model.*")
    adapted = get_peft_model(model, config).get_base_model()
    parts = (adapted.model.language_model, adapted.model.vision_tower)
    assert [any("lora" in name for name, _ in part.named_modules()) for part in parts] == [False, True]


@torch.no_grad()
def outputs(model, processor, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and losses of both heads."""
    found = model(**PumaDataCollator(processor)(rows))
    return found.logits, torch.stack([found.text_loss, found.image_loss])


@pytest.mark.parametrize("tied", [True, False])
def test_the_adapter_alone_is_saved_and_is_all_that_changed(processor, rows, tmp_path, tied):
    text_config = {**TEXT, "tie_word_embeddings": tied}
    start = make_model(processor, text_config=text_config)
    trained = train(processor, rows, tmp_path, tied)
    for name, parameter in start.named_parameters():
        kept = dict(trained.get_base_model().named_parameters())
        found = next(kept[key] for key in kept if same_name(key, name))
        assert torch.equal(found, parameter), name

    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(value.numel() for value in saved.values()) == trained.num_parameters(only_trainable=True)
    assert any("image_head" in name for name in saved) and any("projector" in name for name in saved)
    assert not any("vision_tower" in name for name in saved)
    tokens = [value for name, value in saved.items() if "trainable_tokens" in name]
    assert [value.shape[0] for value in tokens] == [227] * (1 if tied else 2)

    loaded = PeftModel.from_pretrained(make_model(processor, text_config=text_config), tmp_path).eval()
    expected = outputs(trained, processor, rows)
    torch.testing.assert_close(outputs(loaded, processor, rows), expected)
    plain = outputs(make_model(processor, text_config=text_config), processor, rows)
    assert not torch.allclose(plain[0], expected[0]) and not torch.allclose(plain[1], expected[1])


def same_name(wrapped: str, plain: str) -> bool:
    for mark in ("base_layer.", "original_module.", "token_adapter."):
        wrapped = wrapped.replace(mark, "")
    return wrapped == plain


@pytest.mark.parametrize("tied", [True, False])
def test_merged_it_is_a_plain_model(processor, rows, tmp_path, tied):
    trained = train(processor, rows, tmp_path, tied)
    expected = outputs(trained, processor, rows)
    merged = trained.merge_and_unload()
    assert type(merged) is PumaForConditionalGeneration
    merged.save_pretrained(tmp_path / "merged")
    again = PumaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(again, processor, rows), expected, rtol=1e-4, atol=1e-5)


def test_adapters_are_switched(processor, rows, tmp_path):
    first = outputs(train(processor, rows, tmp_path / "first", seed=1), processor, rows)
    second = outputs(train(processor, rows, tmp_path / "second", seed=2), processor, rows)
    base = make_model(processor, text_config={**TEXT, "tie_word_embeddings": True})
    plain = outputs(base, processor, rows)
    model = PeftModel.from_pretrained(base, tmp_path / "first", adapter_name="first").eval()
    model.load_adapter(tmp_path / "second", adapter_name="second")
    torch.testing.assert_close(outputs(model, processor, rows), first)
    model.set_adapter("second")
    torch.testing.assert_close(outputs(model, processor, rows), second)
    assert not torch.allclose(first[0], second[0])
    with model.disable_adapter():
        torch.testing.assert_close(outputs(model, processor, rows), plain)


def test_an_adapted_model_draws(processor, rows, tmp_path):
    model = train(processor, rows, tmp_path)
    inputs = processor.prepare_generation(["a picture"])
    found = model.generate_image_features(**inputs, scale=1)
    expected = model.merge_and_unload().generate_image_features(**inputs, scale=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_all_linear_layers_as_peft_finds_them(processor, rows, tmp_path):
    """Those of the heads too, which PEFT puts a class of its own around."""
    with torch.enable_grad():
        adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(make_model(processor), adapter)
        arguments = PumaTrainingArguments(
            str(tmp_path), max_steps=2, learning_rate=0.05, save_strategy="no", report_to="none", use_cpu=True
        )
        PumaTrainer(adapted, arguments, processing_class=processor, train_dataset=rows).train()
    adapted.eval()
    assert adapted.get_base_model().image_head.lora_B["default"].weight.any()
    prompt = processor.prepare_generation(["a picture"])
    features = adapted.generate_image_features(**prompt)
    merged = adapted.merge_and_unload().generate_image_features(**prompt)
    for scale in features:
        torch.testing.assert_close(features[scale], merged[scale], rtol=1e-4, atol=1e-4)


def test_without_token_ids_the_vocabulary_stays(processor, model):
    assert puma_lora_config(model, []).trainable_token_indices is None
    assert puma_lora_config(model, [], r=3, modules_to_save=["image_head"]).modules_to_save == ["image_head"]
    assert len(puma_token_ids(processor)) == 227


def test_qlora(processor, rows, tmp_path):
    """Four-bit weights below the adapter; the loss falls and the adapter alone is saved."""
    wide = {**TEXT, "hidden_size": 64, "intermediate_size": 128}
    make_model(processor, text_config=wide).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=UNQUANTIZED,
    )
    model = PumaForConditionalGeneration.from_pretrained(tmp_path / "base", quantization_config=quantization)
    four_bits = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.uint8}
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert four_bits == {name for name in linear if "language_model" in name}
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, puma_lora_config(model, puma_token_ids(processor), r=2))
    layer = model.get_base_model().model.language_model.layers[0].self_attn.q_proj.base_layer
    assert layer.weight.dtype == torch.uint8
    arguments = PumaTrainingArguments(
        str(tmp_path),
        max_steps=20,
        learning_rate=0.01,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    trainer = PumaTrainer(model, arguments, processing_class=processor, train_dataset=rows)
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    trainer.save_model()
    assert not any("base_layer" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_image_queries_are_trained_and_saved(processor, rows, tmp_path):
    """No backbone had them, so an adapter to one holds them in full."""
    base = make_model(processor, image_decoding="next_scale")
    model = get_peft_model(base, puma_lora_config(base, [], r=2))
    before = base.model.image_queries.weight.clone()
    arguments = PumaTrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=0.01, report_to="none", use_cpu=True, disable_tqdm=True
    )
    PumaTrainer(model, arguments, processing_class=processor, train_dataset=rows).train()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_model(processor, image_decoding="next_scale"), tmp_path / "adapter")
    trained = loaded.get_base_model().model.image_queries.weight
    assert not torch.equal(trained, before)
    inputs = processor.prepare_generation(["a picture"])
    expected = model.eval().generate_image_features(**inputs)
    for scale, features in loaded.generate_image_features(**inputs).items():
        torch.testing.assert_close(features, expected[scale])


def test_a_quantised_projector_reads_pictures(processor, picture, tmp_path):
    """Four bits in all linear layers, as where no module is named to be left alone."""
    wide = {**TEXT, "hidden_size": 64, "intermediate_size": 128}
    config = make_config(processor, wide)
    config.vision_config = CLIPVisionConfig(**{**VISION, "hidden_size": 64, "intermediate_size": 128})
    model = PumaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    loaded = PumaForConditionalGeneration.from_pretrained(tmp_path, quantization_config=quantization)
    assert loaded.model.projector.weight.dtype == torch.uint8
    features = torch.randn(1, IMAGE_LENGTH, 64)
    found, expected = loaded.model.read_states(features), model.model.read_states(features)
    assert (found - expected).norm() < 0.2 * expected.norm()
    inputs = processor.prepare_question(["what?"], [[picture]])
    assert torch.isfinite(loaded(**inputs).logits).all()
