import re

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import SFTConfig

from transformers_puma import PumaForConditionalGeneration, PumaProcessor
from transformers_puma.training import PumaSFTConfig, PumaSFTTrainer, PumaTrainer, PumaTrainingArguments

from ..conftest import make_model, make_picture


def make_rows() -> list[dict]:
    pictures = [make_picture(i) for i in range(4)]
    ask = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    draw = {"role": "user", "content": [{"type": "text", "text": "draw it"}]}
    say = {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}
    drawn = {"role": "assistant", "content": [{"type": "image"}]}
    return [
        {"messages": [ask, say, draw, drawn], "images": pictures[:2]},
        {"prompt": "<image>red", "completion": "<image>", "images": pictures[2:]},
        {"text": "all of it"},
        {"prompt": "hello", "completion": "world"},
    ]


def stream(rows: list[dict]) -> IterableDataset:
    """Rows of several kinds; a table of them would need the columns of all."""
    return IterableDataset.from_generator(lambda: iter(rows))


OPTIONS = dict(
    max_steps=3,
    per_device_train_batch_size=4,
    learning_rate=1e-3,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    bf16=False,
    disable_tqdm=True,
    max_grad_norm=0.0,
    projector_learning_rate=5e-3,
    lr_scheduler_type="linear",
    gradient_checkpointing=False,
)
PARTS = ("loss", "text_loss", "image_loss", "mse_scale_0", "mse_scale_1", "mse_scale_2")


def make_trainer(processor, folder, dataset, model=None, **kwargs) -> PumaSFTTrainer:
    args = {key: kwargs.pop(key) for key in list(kwargs) if key != "peft_config"}
    config = PumaSFTConfig(str(folder), **{**OPTIONS, **args})
    return PumaSFTTrainer(
        model or make_model(processor), config, train_dataset=dataset, processing_class=processor, **kwargs
    )


def test_stock_arguments_are_taken_over(processor, tmp_path):
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1, packing=True)
    trainer = PumaSFTTrainer(
        make_model(processor), args, train_dataset=stream(make_rows()), processing_class=processor
    )
    assert isinstance(trainer.args, PumaSFTConfig) and trainer.args.packing and trainer.args.assistant_only_loss
    assert trainer.data_collator.packing and trainer.data_collator.max_length is None


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("packing", [False, True])
def test_it_trains_as_the_plain_trainer_does(processor, tmp_path, packing):
    """Rows of all kinds, texts and images: the same losses, parts of it, and parameters."""
    rows = make_rows()
    trainer = make_trainer(processor, tmp_path, stream(rows), packing=packing)
    trainer.train()
    plain = PumaTrainer(
        make_model(processor),
        PumaTrainingArguments(str(tmp_path), **OPTIONS, packing=packing),
        processing_class=processor,
        train_dataset=stream(rows),
    )
    plain.train()
    for key in PARTS:
        assert len(history(trainer, key)) == 3 and history(trainer, key) == history(plain, key), key
    for ours, theirs in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert trainer.args.packing == packing and trainer.args.assistant_only_loss
    assert not torch.equal(trainer.model.image_head.weight, make_model(processor).image_head.weight)


def test_accumulation_changes_nothing(processor, tmp_path):
    """Each row alone in a micro-batch, of text, of images or both."""
    whole = make_trainer(processor, tmp_path, stream(make_rows()))
    whole.train()
    options = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4, gradient_checkpointing=True)
    parts = make_trainer(processor, tmp_path, stream(make_rows()), **options)
    parts.train()
    for key in PARTS:
        assert history(parts, key) == pytest.approx(history(whole, key), rel=1e-4), key
    for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_only_the_assistant_is_supervised_unless_told(processor, tmp_path):
    row = make_rows()[0]
    dataset = Dataset.from_list([row])
    masks = []
    for only in (True, False):
        trainer = make_trainer(processor, tmp_path, dataset, assistant_only_loss=only)
        masks.append(next(iter(trainer.get_train_dataloader()))["image_loss_mask"].tolist())
    assert masks == [[False, True], [True, True]]


def test_an_adapter_trains_the_heads(processor, tmp_path):
    from transformers_puma.training import puma_lora_config

    model = make_model(processor)
    trainer = make_trainer(
        processor,
        tmp_path,
        stream(make_rows()),
        model=model,
        peft_config=puma_lora_config(model, [processor.image_start_token_id], r=2),
        gradient_checkpointing=True,
    )
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {
        name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert changed == {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    for part in ("projector.modules_to_save", "image_head.modules_to_save", "lora_B", "trainable_tokens_delta"):
        assert any(part in name for name in changed), part
    assert not any("vision_tower" in name for name in changed)
    assert history(trainer, "loss")[-1] < history(trainer, "loss")[0]


def test_parts_of_the_loss_are_evaluated(processor, tmp_path):
    trainer = make_trainer(processor, tmp_path, stream(make_rows()), per_device_eval_batch_size=4)
    metrics = trainer.evaluate(stream(make_rows()))
    weighted = 0.02 * metrics["eval_text_loss"] + metrics["eval_image_loss"]
    assert metrics["eval_loss"] == pytest.approx(weighted, rel=1e-5)
    assert {f"eval_{part}" for part in PARTS} <= metrics.keys()


def test_a_folder_is_loaded_in_four_bits(processor, tmp_path):
    make_model(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    arguments = PumaSFTConfig(str(tmp_path), **OPTIONS)
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    adapter = LoraConfig(target_modules=["q_proj"], r=2)
    options = {"train_dataset": stream(make_rows()), "quantization_config": quantization, "peft_config": adapter}
    trainer = PumaSFTTrainer(str(tmp_path / "model"), arguments, **options)
    assert type(trainer.model.get_base_model().model.language_model.layers[0].mlp.up_proj) is Linear4bit
    with pytest.raises(ValueError, match="(?s)quantization_config.* has no part in a model that is given"):
        PumaSFTTrainer(make_model(processor), arguments, processing_class=processor, **options)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("loss_type", "dft"),
        ("completion_only_loss", False),
        ("padding_free", True),
        ("dataset_text_field", "body"),
        ("pad_token", "</s>"),
        ("dataset_num_proc", 2),
        ("dataset_kwargs", {"add_special_tokens": False}),
        ("trust_remote_code", True),
        ("router_aux_loss_coef", 0.1),
    ],
)
def test_options_that_would_do_nothing(tmp_path, option, value):
    with pytest.raises(ValueError, match=re.escape(f"does not support {option}={value!r}")):
        PumaSFTConfig(str(tmp_path), use_cpu=True, bf16=False, **{option: value})


def test_a_folder_in_place_of_a_model(processor, tmp_path):
    model = make_model(processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = PumaSFTConfig(str(tmp_path / "out"), **OPTIONS)
    trainer = PumaSFTTrainer(str(tmp_path), config, train_dataset=stream(make_rows()))
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    loaded = PumaForConditionalGeneration.from_pretrained(tmp_path)
    assert isinstance(
        PumaSFTTrainer(loaded, config, train_dataset=stream(make_rows())).processing_class, PumaProcessor
    )
    with pytest.raises(ValueError, match="processing_class .* is needed"):
        PumaSFTTrainer(model, config, train_dataset=stream(make_rows()))


def test_the_settings_of_recipes_for_pictures(processor, tmp_path):
    """TRL's own form of rows with pictures, and what its users set for them."""
    settings = {"dataset_kwargs": {"skip_prepare_dataset": True}, "dataset_text_field": ""}
    said = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a cat"}]
    rows = [{"prompt": said[:1], "completion": said[1:], "images": [make_picture(i)]} for i in range(4)]
    trainer = make_trainer(processor, tmp_path, Dataset.from_list(rows), **{**settings, "max_steps": 1})
    trainer.train()
    assert 0 < trainer.state.log_history[0]["text_loss"] < 20


def test_without_trl_the_extra_is_named(monkeypatch):
    import sys

    import transformers_puma.training as training

    for name in ("sft_trainer", "trl_common"):
        monkeypatch.delitem(sys.modules, f"transformers_puma.training.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"PumaSFTTrainer needs trl: pip install 'puma-hub\[train\]'"):
        training.__getattr__("PumaSFTTrainer")


def test_a_resumed_run_equals_an_unbroken_one(processor, tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2)
    options |= dict(per_device_train_batch_size=1, packing=True, feature_noise=0.1)
    unbroken = make_trainer(processor, tmp_path, stream(make_rows()), **options)
    unbroken.train()
    resumed = make_trainer(processor, tmp_path, stream(make_rows()), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert history(resumed, "loss")[2:] == history(unbroken, "loss")[2:]
    for ours, theirs in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
