import pytest
import torch
from transformers import Trainer, TrainingArguments

from transformers_puma import flatten_scales
from transformers_puma.granularity import scale_of_position
from transformers_puma.training import PumaDataCollator, PumaTrainer, PumaTrainingArguments, standardize_feature_heads

from ..conftest import make_model, make_picture

NEXT_SCALE = dict(image_decoding="next_scale")


@pytest.fixture(scope="module")
def rows():
    pictures = [make_picture(i) for i in range(8)]
    drawn = [{"prompt": f"picture {i}", "completion": "<image>", "images": [pictures[i]]} for i in range(4)]
    read = [{"prompt": "<image>", "completion": "words " * i, "images": [pictures[i]]} for i in range(4, 8)]
    return [row for pair in zip(drawn, read, strict=True) for row in pair]


def make_trainer(processor, rows, folder, model=None, **kwargs):
    defaults = dict(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0.0,
    )
    model = model or make_model(processor)
    arguments = PumaTrainingArguments(**{**defaults, **kwargs})
    return PumaTrainer(model, arguments, processing_class=processor, train_dataset=rows)


def read_by_the_model(trainer):
    """What the model is fed of images, call by call of its forward in training."""
    calls = []
    forward = trainer.model.forward

    def spy(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        calls.append((kwargs, outputs))
        return outputs

    trainer.model.forward = spy
    return calls


def history(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("own_feature_share", [0.0, 0.5])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_accumulation_changes_nothing(processor, rows, tmp_path, batch_size, accumulation, own_feature_share):
    """Rows with text or pictures alone fall into different micro-batches; both means are over the whole batch."""
    decoding = NEXT_SCALE if own_feature_share else {}

    def trained(batch_size, accumulation):
        trainer = make_trainer(
            processor,
            rows,
            tmp_path,
            model=make_model(processor, **decoding),
            own_feature_share=own_feature_share,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        return trainer

    whole, parts = trained(8, 1), trained(batch_size, accumulation)
    for key in ("loss", "text_loss", "image_loss"):
        assert history(parts, key) == pytest.approx(history(whole, key), rel=1e-4)
    for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_logged_parts_make_up_the_loss_where_an_epoch_ends_within_a_step(processor, rows, tmp_path):
    """Steps of 2, 2 and 1 rows, all in one entry of the log."""
    settings = dict(per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=3, logging_steps=3)
    trainer = make_trainer(processor, rows[:5], tmp_path, **settings)
    trainer.train()
    (loss,), (text,), (image,) = (history(trainer, key) for key in ("loss", "text_loss", "image_loss"))
    assert loss == pytest.approx(0.02 * text + image, rel=1e-4)


def test_the_loss_falls_and_its_parts_are_logged(processor, rows, tmp_path):
    trainer = make_trainer(processor, rows, tmp_path, max_steps=30, per_device_train_batch_size=8)
    trainer.train()
    assert history(trainer)[-1] < 0.7 * history(trainer)[0]
    for text, image, loss in zip(*(history(trainer, key) for key in ("text_loss", "image_loss", "loss")), strict=True):
        assert loss == pytest.approx(0.02 * text + image, rel=1e-4)
    assert all(len(history(trainer, f"mse_scale_{scale}")) == 30 for scale in range(3))


def test_the_encoder_is_frozen_and_all_else_trained(processor, rows, tmp_path):
    trainer = make_trainer(processor, rows, tmp_path, feature_noise=0.1)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed != ("vision_tower" in name), name


def test_the_projector_has_its_own_rate(processor, rows, tmp_path):
    trainer = make_trainer(processor, rows, tmp_path, projector_learning_rate=0.5, weight_decay=0.1)
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    seen = set()
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr"] == (0.5 if name.startswith(("model.projector", "image_head")) else 1e-3)
            assert group["weight_decay"] == (0.0 if name.endswith("bias") or "norm" in name else 0.1), name
            seen.add(name)
    assert seen == {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}


def test_a_resumed_run_equals_an_unbroken_one(processor, rows, tmp_path):
    options = dict(max_steps=6, feature_noise=0.2, save_strategy="steps", save_steps=3)
    unbroken = make_trainer(processor, rows, tmp_path, **options)
    unbroken.train()
    resumed = make_trainer(processor, rows, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert history(resumed)[3:] == history(unbroken)[3:]
    for ours, theirs in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("source", ["images", "image_features"])
def test_own_features_are_what_generation_writes(processor, rows, tmp_path, source):
    """The last pass reads what `generate_image_features` gives for each prompt, and its loss is against the truth."""
    model = make_model(processor, **NEXT_SCALE)
    prompts = [f"{'long ' * i}picture {i}" for i in range(4)]
    true = model.get_image_features(
        processor.image_processor([rows[2 * i]["images"][0] for i in range(4)], return_tensors="pt")["pixel_values"]
    ).last_hidden_state
    given = [{"images": rows[2 * i]["images"]} if source == "images" else {source: [true[i]]} for i in range(4)]
    drawn = [
        {"prompt": prompt, "completion": "<image>", **image} for prompt, image in zip(prompts, given, strict=True)
    ]
    options = dict(own_feature_share=1.0, max_steps=1, per_device_train_batch_size=4)
    trainer = make_trainer(processor, drawn, tmp_path, model=model, **options)
    calls = read_by_the_model(trainer)
    trainer.get_train_dataloader = lambda: [trainer.data_collator(drawn)]
    expected = flatten_scales(model.generate_image_features(**processor.prepare_generation(prompts, None)))
    trainer.train()
    assert [outputs.loss.requires_grad for _, outputs in calls] == [False, False, True]
    kwargs, outputs = calls[-1]
    # All but the finest scale, which nothing reads.
    torch.testing.assert_close(kwargs["read_features"][:, :5], expected[:, :5], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.predicted_features, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.image_features, true)
    weights = torch.tensor(model.config.scale_loss_weights)[scale_of_position(model.config.tokens_per_scale)]
    plain = (weights * (expected - true).square().mean(-1)).mean()
    assert outputs.image_loss.item() == pytest.approx(plain.item(), rel=1e-3)


def test_pictures_that_are_read_stay_as_they_are(processor, rows, tmp_path):
    picture, drawn = rows[0]["images"][0], rows[2]["images"][0]
    edits = [{"prompt": "<image>other", "completion": "<image>", "images": [picture, drawn]}] * 2
    options = dict(own_feature_share=1.0, max_steps=1)
    trainer = make_trainer(processor, edits, tmp_path, model=make_model(processor, **NEXT_SCALE), **options)
    calls = read_by_the_model(trainer)
    trainer.train()
    read, true = calls[-1][0]["read_features"], calls[0][1].image_features
    assert torch.equal(read[::2], true[::2]) and not (read[1::2] == true[1::2]).any()


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": True}])
def test_with_own_features_all_is_trained(processor, rows, tmp_path, options):
    model = make_model(processor, **NEXT_SCALE)
    trainer = make_trainer(processor, rows, tmp_path, model=model, own_feature_share=1.0, **options)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer.train()
    for name, parameter in model.named_parameters():
        assert (not torch.equal(parameter, before[name])) != ("vision_tower" in name), name


def test_there_are_as_many_passes_as_scales(processor, rows, tmp_path):
    """Rows that end after a coarse scale need fewer, rows without written pictures and evaluations one."""
    model = make_model(processor, **NEXT_SCALE)
    trainer = make_trainer(processor, rows, tmp_path, model=model, own_feature_share=1.0)
    calls = read_by_the_model(trainer)

    def passes(rows, training=True):
        calls.clear()
        model.train(training)
        trainer.compute_loss(model, trainer.data_collator(rows))
        return len(calls)

    assert [passes([{**rows[0], "finest_scale": scale}]) for scale in range(3)] == [3, 2, 1]
    assert passes(rows[1::2]) == passes([{"text": "words"}]) == passes(rows, training=False) == 1
    assert calls[0][0].get("read_features") is None


def test_packing_changes_no_own_features(processor, rows, tmp_path):
    losses = []
    for packing in (False, True):
        model = make_model(processor, **NEXT_SCALE).train()
        trainer = make_trainer(processor, rows, tmp_path, model=model, own_feature_share=1.0, packing=packing)
        losses.append(trainer.compute_loss(model, trainer.data_collator(rows)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_share_of_own_features_is_of_steps_and_resumes(processor, rows, tmp_path):
    options = dict(own_feature_share=0.5, max_steps=12, save_strategy="steps", save_steps=6)

    def passes(resume):
        trainer = make_trainer(processor, rows[::2], tmp_path, model=make_model(processor, **NEXT_SCALE), **options)
        calls = read_by_the_model(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return [outputs.loss.requires_grad for _, outputs in calls], history(trainer)

    whole, losses = passes(None)
    resumed, again = passes(str(tmp_path / "checkpoint-6"))
    assert sum(whole) == 12 and 0 < whole.count(False) < 24 and whole.count(False) % 2 == 0
    assert resumed == whole[-len(resumed) :] and losses == again


@pytest.mark.parametrize(
    ("share", "settings", "message"),
    [
        (1.5, NEXT_SCALE, "own_feature_share=1.5 must be from 0 to 1"),
        (0.5, {}, "the model has 'autoregressive' with 'regression'"),
        (0.5, {"image_decoding": "prefilled"}, "the model has 'prefilled'"),
        (0.5, {**NEXT_SCALE, "image_head": "flow"}, "with 'flow'"),
    ],
)
def test_own_features_where_they_cannot_be(processor, rows, tmp_path, share, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(processor, rows, tmp_path, model=make_model(processor, **settings), own_feature_share=share)


def test_a_checkpoint_is_a_model_folder(processor, rows, tmp_path):
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    trainer = make_trainer(processor, rows, tmp_path)
    trainer.train()
    trainer.save_model()
    again = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    for ours, theirs in zip(again.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert AutoProcessor.from_pretrained(tmp_path).image_seq_length == processor.image_seq_length


def test_an_evaluation_is_a_mean_over_tokens_whatever_the_batches(processor, rows, tmp_path):
    """Also where some batches draw and others read, as in data of several tasks."""
    trainer = make_trainer(processor, rows, tmp_path)
    with torch.no_grad():
        expected = trainer.model.eval()(**trainer.data_collator(rows))
    for size in (8, 4, 3, 1):
        for order in (rows, rows[::2] + rows[1::2]):
            trainer = make_trainer(processor, rows, tmp_path, per_device_eval_batch_size=size)
            metrics = trainer.evaluate(order)
            for name in ("loss", "text_loss", "image_loss"):
                assert metrics[f"eval_{name}"] == pytest.approx(expected[name].item(), rel=1e-5), (size, name)


def test_an_evaluation_of_nothing_has_no_losses(processor, rows, tmp_path):
    trainer = make_trainer(processor, rows, tmp_path)
    assert not [key for key in trainer.evaluate([]) if "loss" in key or "mse" in key]


def test_an_evaluation_counts_text_alone_whatever_the_labels_of_images(processor, rows, tmp_path):
    expected = make_trainer(processor, rows, tmp_path).evaluate(rows)
    trainer = make_trainer(processor, rows, tmp_path)
    collator, image = trainer.data_collator, processor.image_token_id

    def with_image_labels(rows):
        batch = collator(rows)
        return {**batch, "labels": torch.where(batch["input_ids"] == image, image, batch["labels"])}

    trainer.data_collator = with_image_labels
    metrics = trainer.evaluate(rows)
    for name in ("loss", "text_loss", "image_loss"):
        assert metrics[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], rel=1e-5), name


def test_standardised_heads_start_at_the_features_mean(processor):
    model = make_model(processor)
    torch.nn.init.normal_(model.model.projector.weight, std=0.02)
    mean, std = torch.linspace(-5, 5, 32), torch.linspace(0.01, 10, 32)
    plain = {"projector": model.model.projector, "head": model.image_head}
    weights = {name: (layer.weight.clone(), layer.bias.clone()) for name, layer in plain.items()}
    standardize_feature_heads(model, mean, std)
    features, states = torch.randn(7, 32) * std + mean, torch.randn(7, 32)
    weight, bias = weights["projector"]
    expected = (features - mean) / std @ weight.T + bias
    torch.testing.assert_close(model.model.projector(features), expected, rtol=1e-4, atol=1e-4)
    weight, bias = weights["head"]
    torch.testing.assert_close(model.image_head(states), (states @ weight.T + bias) * std + mean)


@pytest.mark.parametrize("image_head", ["regression", "flow"])
def test_a_constant_channel_gives_finite_weights(processor, image_head):
    model = make_model(processor, image_head=image_head)
    std = torch.linspace(0, 10, 32)
    standardize_feature_heads(model, torch.ones(32), std)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    if image_head == "flow":
        assert (model.image_head.std > 0).all()
        torch.testing.assert_close(model.image_head.std[0, 1:], std[1:])


def test_the_stock_trainer_averages_over_accumulation(processor, tmp_path):
    """It knows one count, and the model takes two: so the mean is over micro-batches, not scaled by their number."""
    rows = [{"text": text} for text in ("hello", "world", "abcde", "fghij")]
    losses = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        collator = PumaDataCollator(processor)
        trainer = Trainer(make_model(processor), arguments, data_collator=collator, train_dataset=rows)
        trainer.train()
        losses += history(trainer)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("part", ["nothing", "tokenizer"])
def test_a_trainer_needs_a_processor_or_a_collator(processor, tmp_path, part):
    arguments = PumaTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="processing_class"):
        PumaTrainer(make_model(processor), arguments, processing_class=getattr(processor, part, None))


def test_stock_arguments_are_taken_over(processor, rows, tmp_path):
    """What a user set is kept; what is at the stock default takes PUMA's, so rows keep their columns."""
    given = dict(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=3, logging_steps=1, seed=7)
    trainers = [
        PumaTrainer(make_model(processor), kind(**given), processing_class=processor, train_dataset=rows)
        for kind in (TrainingArguments, PumaTrainingArguments)
    ]
    for trainer in trainers:
        assert isinstance(trainer.args, PumaTrainingArguments) and not trainer.args.remove_unused_columns
        trainer.train()
    stock, own = trainers
    assert stock.args.to_dict() == own.args.to_dict() and stock.args.seed == 7
    assert history(stock) == history(own) and len(history(own)) == 3


def test_another_kind_of_model_is_refused(processor, tmp_path):
    arguments = PumaTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="model must be a PumaForConditionalGeneration, got a LlamaModel"):
        PumaTrainer(make_model(processor).model.language_model, arguments, processing_class=processor)


def test_an_evaluation_computes_the_logits_that_it_needs(processor, rows, tmp_path):
    """For the loss alone those with labels; for metrics all of them, and nothing that has no row for each example."""
    trainer = make_trainer(processor, rows, tmp_path, per_device_eval_batch_size=2)
    heads = []
    trainer.model.lm_head.register_forward_hook(lambda module, inputs, output: heads.append(output[..., 0].numel()))
    metrics = trainer.evaluate(rows)
    labels = [trainer.data_collator(rows[i : i + 2])["labels"][:, 1:] != -100 for i in range(0, len(rows), 2)]
    assert heads == [mask.sum() for mask in labels]

    texts = [{"prompt": "a", "completion": "b"}] * 2
    predicted = trainer.predict([*rows, *texts])
    assert predicted.predictions.shape == (len(rows) + 2, predicted.label_ids.shape[1], 512)
    seen = []
    trainer.compute_metrics = lambda prediction: seen.append(prediction.predictions.shape) or {"rows": len(rows)}
    measured = trainer.evaluate(rows)
    assert seen == [(len(rows), *predicted.predictions.shape[1:])] and measured["eval_rows"] == len(rows)
    assert measured["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


def test_resuming_in_the_same_process_with_a_rate_of_the_projector(processor, rows, tmp_path):
    trainer = make_trainer(
        processor, rows, tmp_path, projector_learning_rate=1e-4, save_strategy="steps", save_steps=2
    )
    trainer.train()
    unbroken = history(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert history(trainer) == unbroken and len(unbroken) == 4


def test_a_model_that_is_made_at_the_start_of_training(processor, rows, tmp_path):
    arguments = PumaTrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = PumaTrainer(
        args=arguments, model_init=lambda: make_model(processor), processing_class=processor, train_dataset=rows
    )
    trainer.train()
    assert history(trainer, "train_loss")
    assert not any(parameter.requires_grad for parameter in trainer.model.model.vision_tower.parameters())


def test_an_optimizer_that_is_given_has_its_own_rates(processor, rows, tmp_path):
    model = make_model(processor)
    options = {"processing_class": processor, "train_dataset": rows}
    options["optimizers"] = torch.optim.SGD(model.parameters(), lr=0.1), None
    trainer = PumaTrainer(model, PumaTrainingArguments(str(tmp_path), report_to="none", use_cpu=True), **options)
    assert [group["lr"] for group in trainer.create_optimizer().param_groups] == [0.1]
    arguments = PumaTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, projector_learning_rate=1e-4)
    with pytest.raises(ValueError, match="projector_learning_rate=0.0001 has no part in an optimizer that is given"):
        PumaTrainer(model, arguments, **options)


def test_errors_of_scales_are_means_over_tokens_and_steps(processor, rows, tmp_path):
    trainer = make_trainer(processor, rows, tmp_path, per_device_eval_batch_size=3)
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        outputs = trainer.model.eval()(**batch)
    error = (outputs.predicted_features - outputs.image_features)[batch["image_loss_mask"]].square().mean(-1)
    expected = [error[:, 5:].mean().item(), error[:, 1:5].mean().item(), error[:, :1].mean().item()]
    metrics = trainer.evaluate(rows)
    assert [metrics[f"eval_mse_scale_{i}"] for i in range(3)] == pytest.approx(expected, rel=1e-4)
    steps = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1)
    trainer = make_trainer(processor, rows, tmp_path, **steps)
    trainer.train()
    assert [history(trainer, f"mse_scale_{i}")[0] for i in range(3)] == pytest.approx(expected, rel=1e-4)
