"""The loss that trainers minimise, against a plain formula, and what must not change it."""

import copy
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset

from transformers_puma.training import PumaDataCollator, PumaTrainer, PumaTrainingArguments

from ..conftest import IMAGE_LENGTH, TEXT, make_model, make_picture

ALPHA = {2: 64, 1: 8, 0: 1}


def make_rows() -> list[dict]:
    pictures = [make_picture(i) for i in range(6)]
    return [
        {"prompt": "a cat", "completion": "<image>", "images": pictures[:1]},
        {"prompt": "<image>red", "completion": "<image>", "images": pictures[1:3]},
        {"prompt": "<image>", "completion": "some words " * 5, "images": pictures[3:4]},
        {"text": "all of it"},
        {"text": "here <image> and there <image>", "images": pictures[4:]},
        {"prompt": "a", "completion": "b"},
        {"prompt": "a dog", "completion": "<image>", "images": pictures[:1], "finest_scale": 1},
        {"text": "x"},
    ]


@torch.no_grad()
def plain_loss(model, collator, rows) -> float:
    """0.02 times the mean over text tokens, plus the mean over image tokens (report equation 2); row by row."""
    texts, images = [], []
    for row in rows:
        batch = collator([row])
        labels, targets = batch.pop("labels")[0], batch.pop("image_loss_mask", None)
        ids = batch["input_ids"][0]
        outputs = model.model(**batch)
        states = outputs.last_hidden_state[0]
        image, offset = -1, 0
        for t in range(1, len(ids)):
            if labels[t] != -100:
                texts.append(-(model.lm_head.weight @ states[t - 1]).log_softmax(0)[labels[t]])
            if ids[t] == model.config.image_token_id:
                offset = offset + 1 if ids[t - 1] == model.config.image_token_id else 0
                image += offset == 0
                if targets[image]:
                    predicted = model.image_head.weight @ states[t - 1] + model.image_head.bias
                    scale = 2 if offset < 1 else 1 if offset < 1 + 4 else 0
                    error = (predicted - outputs.image_features[image, offset]).square().mean()
                    images.append(ALPHA[scale] * error)
    return (0.02 * torch.stack(texts).mean() + torch.stack(images).mean()).item()


def train(processor, folder, rows, **kwargs) -> PumaTrainer:
    options = dict(
        max_steps=1,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0.0,
    )
    arguments = PumaTrainingArguments(str(folder), **{**options, **kwargs})
    trainer = PumaTrainer(make_model(processor), arguments, processing_class=processor, train_dataset=rows)
    trainer.train()
    return trainer


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulation", [1, 2, 8])
@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_that_of_the_report(processor, tmp_path, accumulation, packing):
    model = make_model(processor)
    expected = plain_loss(model, PumaDataCollator(processor, model.config.tokens_per_scale), make_rows())
    options = dict(per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation)
    trainer = train(processor, tmp_path, make_rows(), packing=packing, **options)
    assert losses(trainer) == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("image_decoding", ["autoregressive", "next_scale"])
def test_packed_gradients_are_those_of_padded_rows(processor, attention, image_decoding):
    model = make_model(processor, image_decoding=image_decoding).train()
    model.set_attn_implementation(attention)
    model.model.vision_tower.requires_grad_(False)
    found = {}
    for packing in (False, True):
        model.zero_grad()
        batch = PumaDataCollator(processor, model.config.tokens_per_scale, packing=packing)(make_rows())
        outputs = model(**batch, use_cache=False)
        outputs.loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
        found[packing] = [outputs.loss.detach(), outputs.scale_losses, *gradients]
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-5)
    batch.pop("position_ids")
    assert abs(model(**batch, use_cache=False).loss.item() / found[True][0].item() - 1) > 1e-3


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"gradient_checkpointing": True}, 1e-6),
        ({"bf16": True}, 2e-2),
        ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, 1e-5),
    ],
)
def test_what_saves_memory_or_time_changes_only_rounding(processor, tmp_path, options, tolerance):
    rows = make_rows()[:4]
    plain = train(processor, tmp_path, rows, max_steps=2, per_device_train_batch_size=4)
    other = train(processor, tmp_path, rows, max_steps=2, per_device_train_batch_size=4, **options)
    assert losses(other) == pytest.approx(losses(plain), rel=tolerance)


@pytest.mark.parametrize("image_head", ["regression", "flow"])
@pytest.mark.parametrize("image_decoding", ["autoregressive", "next_scale"])
@pytest.mark.parametrize("row", [3, 2])
def test_every_module_of_images_runs_in_every_batch(processor, image_head, image_decoding, row):
    """In batches of text alone, and of images that are only read: sharded training would wait for ever otherwise."""
    model = make_model(processor, image_decoding=image_decoding, image_head=image_head).train()
    model.model.vision_tower.requires_grad_(False)
    seen = []
    model.model.vision_tower.register_forward_hook(lambda *_: seen.append(True))
    model(**PumaDataCollator(processor)([make_rows()[row]])).loss.backward()
    assert seen
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
    assert all(not parameter.grad.any() for parameter in model.image_head.parameters())
    assert row == 2 or not model.model.projector.weight.grad.any()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("model_type", "projection"),
    [
        ("gpt2", "h.0.attn.c_attn"),
        ("opt", "decoder.layers.0.self_attn.q_proj"),
        ("bloom", "h.0.self_attention.query_key_value"),
    ],
)
def test_packing_where_packed_rows_would_see_each_other(processor, tmp_path, model_type, projection, bf16):
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32, "n_positions": 256}
    text = {"model_type": model_type, **sizes, "num_hidden_layers": 2, "num_attention_heads": 2, "dropout": 0.5}
    options = {"max_steps": 1, "packing": True, "bf16": bf16, "report_to": "none", "use_cpu": True}
    arguments = PumaTrainingArguments(str(tmp_path), **options)
    model = make_model(processor, text_config=text)
    if bf16:  # as kernels that know half precision alone; training brings their inputs to it
        model.model.language_model.get_submodule(projection).bfloat16()
    trainer = PumaTrainer(model, arguments, processing_class=processor, train_dataset=make_rows())
    if model_type == "gpt2":
        trainer.train()
        return
    with pytest.raises(ValueError, match=rf"packing=True does not work with this language model \({model_type}\)"):
        trainer.train()


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("llama", None),
        ("opt", "opt has no room for image_decoding='next_scale' (.*): expected .*'autoregressive' or 'prefilled'"),
        ("gpt_neo", "gpt_neo masks what image_decoding='next_scale' lets tokens of a scale see"),
    ],
)
def test_next_scale_where_tokens_of_a_scale_would_not_see_each_other(processor, tmp_path, model_type, message):
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32, "num_layers": 2, "num_heads": 2}
    text = {**TEXT, "model_type": model_type, **sizes, "attention_types": [[["global"], 2]]}
    model = make_model(processor, text_config=text, image_decoding="next_scale")
    arguments = PumaTrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    trainer = PumaTrainer(model, arguments, processing_class=processor, train_dataset=make_rows())
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == (message is None)


def test_next_scale_in_half_precision_where_tokens_are_alike(processor, tmp_path):
    """What the model has learnt of tokens may differ by rounding alone."""
    model = make_model(processor, image_decoding="next_scale").bfloat16()
    embeddings = model.get_input_embeddings().weight.data
    embeddings[:8] = embeddings[8]
    arguments = PumaTrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    trainer = PumaTrainer(model, arguments, processing_class=processor, train_dataset=make_rows())
    trainer.train()
    assert trainer.state.global_step == 1


def test_packing_is_looked_into_before_an_evaluation_too(processor, tmp_path):
    text = {**TEXT, "model_type": "opt", "word_embed_proj_dim": 32, "ffn_dim": 32}
    arguments = PumaTrainingArguments(str(tmp_path), packing=True, report_to="none", use_cpu=True)
    trainer = PumaTrainer(make_model(processor, text_config=text), arguments, processing_class=processor)
    with pytest.raises(ValueError, match="packing=True does not work with this language model"):
        trainer.evaluate([{"text": "a row"}, {"text": "another"}])


@pytest.mark.parametrize("noise", [-1.0, float("nan"), float("inf")])
def test_noise_that_is_none(processor, tmp_path, noise):
    arguments = PumaTrainingArguments(str(tmp_path), feature_noise=noise, report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=f"feature_noise={noise} must be a finite number from 0"):
        PumaTrainer(make_model(processor), arguments, processing_class=processor)


def test_kernels_of_liger(tmp_path):
    with pytest.raises(ValueError, match="use_liger_kernel=True would do nothing"):
        PumaTrainingArguments(str(tmp_path), use_liger_kernel=True)


def test_rows_have_no_lengths_to_be_grouped_by(processor, tmp_path):
    arguments = PumaTrainingArguments(
        str(tmp_path), max_steps=1, train_sampling_strategy="group_by_length", report_to="none", use_cpu=True
    )
    options = {"args": arguments, "processing_class": processor}
    with pytest.raises(ValueError, match="expected a column 'length' in train_dataset"):
        PumaTrainer(make_model(processor), train_dataset=make_rows(), **options)
    rows = Dataset.from_list([{"text": "a" * number, "length": number} for number in (3, 9)])
    trainer = PumaTrainer(make_model(processor), train_dataset=rows, **options)
    trainer.train()
    assert trainer.state.global_step == 1


def test_several_gpus_in_one_process(processor, tmp_path):
    arguments = PumaTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match="one process sees 2 GPUs.*torchrun"):
        PumaTrainer(make_model(processor), arguments, processing_class=processor)


def test_what_has_no_part_in_the_loss(processor, tmp_path):
    arguments = PumaTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        PumaTrainer(make_model(processor), arguments, processing_class=processor)
    for refused in ({"dispatch_batches": True}, {"split_batches": True}, {"even_batches": False}):
        (name,) = refused
        with pytest.raises(ValueError, match=f"{name}={refused[name]}"):
            PumaTrainingArguments(str(tmp_path), use_cpu=True, accelerator_config=refused)
    with pytest.raises(ValueError, match="remove_unused_columns must be False"):
        PumaTrainingArguments(str(tmp_path), use_cpu=True, remove_unused_columns=True)


def test_processes_that_would_train_alone(processor, tmp_path, monkeypatch):
    arguments = PumaTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started.*use_cpu=True"):
        PumaTrainer(make_model(processor), arguments, processing_class=processor)


@pytest.mark.parametrize("name", ["save_strategy", "eval_strategy", "logging_strategy"])
def test_a_stream_has_no_epochs(processor, tmp_path, name):
    stream = Dataset.from_list([{"text": "a cat"}]).to_iterable_dataset()
    arguments = PumaTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, max_steps=1, **{name: "epoch"})
    data = {"train_dataset": stream, "eval_dataset": [{"text": "a cat"}]}
    with pytest.raises(ValueError, match=f"{name}='epoch', but a stream has no end here"):
        PumaTrainer(make_model(processor), arguments, processing_class=processor, **data)


def test_a_processor_of_another_model(processor, tmp_path):
    arguments = PumaTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    other = copy.copy(processor)
    other.image_seq_length = IMAGE_LENGTH - 1
    with pytest.raises(ValueError, match=f"{IMAGE_LENGTH - 1} tokens for a picture, the model {IMAGE_LENGTH}"):
        PumaTrainer(make_model(processor), arguments, processing_class=other)
