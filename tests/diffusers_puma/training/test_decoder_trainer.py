import json

import pytest
import torch
from diffusers import DDPMScheduler
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainingArguments

import diffusers_puma
from diffusers_puma.training import (
    PumaDecoderTrainer,
    PumaDecoderTrainingArguments,
    denoising_loss,
    draw,
    feature_statistics,
    pool_to_tokens,
    sample_noise,
    standardize_projection,
)
from diffusers_puma.unet_puma import PumaUNet2DConditionModel
from tests.killing import losses

from .tiny import CHANNELS, EPSILON, VELOCITY, rows, tiny_unet, trainer


@pytest.mark.parametrize("schedule", [EPSILON, VELOCITY])
def test_denoising_loss_against_the_formulas(schedule):
    scheduler = DDPMScheduler(**schedule)
    torch.manual_seed(0)
    latents, noise, prediction = torch.randn(3, 3, 4, 8, 8).unbind(0)
    timesteps = torch.tensor([10, 500, 900])
    signal = scheduler.alphas_cumprod[timesteps]
    if scheduler.config.prediction_type == "epsilon":
        target, weights = noise, (signal / (1 - signal)).clamp(max=5) / (signal / (1 - signal))
    else:
        alpha, sigma = signal.sqrt()[:, None, None, None], (1 - signal).sqrt()[:, None, None, None]
        # A weight of min(SNR, gamma) on the clean latents' error is min(SNR, gamma) / (SNR + 1) on the velocity's.
        target, weights = alpha * noise - sigma * latents, (signal / (1 - signal)).clamp(max=5) * (1 - signal)
    errors = (prediction - target).pow(2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(denoising_loss(scheduler, prediction, latents, noise, timesteps), errors.mean())
    torch.testing.assert_close(
        denoising_loss(scheduler, prediction, latents, noise, timesteps, min_snr_gamma=5.0), (weights * errors).mean()
    )


def test_noise_offset_is_constant_over_each_channel():
    torch.manual_seed(0)
    means = sample_noise(torch.zeros(2000, 4, 8, 8), 0.1).mean(dim=(2, 3))
    assert means.var().item() == pytest.approx(1 / 64 + 0.1**2, rel=0.1)


def test_several_gpus_in_one_process(tmp_path):
    arguments = PumaDecoderTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match="one process sees 2 GPUs, and PumaDecoderTrainer.*torchrun"):
        PumaDecoderTrainer(
            tiny_unet(),
            arguments,
            noise_scheduler=DDPMScheduler(**EPSILON),
            null_features=torch.zeros(1, 16, CHANNELS),
        )


def test_draws_depend_on_nothing_but_the_key():
    latents = torch.zeros(4, 4, 8, 8)
    keys = [(1, 7, place) for place in range(4)]
    whole = draw(latents, keys, 1000, noise_offset=0.1, image_dropout=0.5)
    torch.manual_seed(99)
    halves = [draw(latents[:2], keys[half], 1000, 0.1, 0.5) for half in (slice(0, 2), slice(2, 4))]
    for together, *parts in zip(whole, *halves, strict=True):
        torch.testing.assert_close(together, torch.cat(parts), rtol=0, atol=0)
    for other in ((2, 7, 0), (1, 8, 0)):
        assert not torch.equal(draw(latents[:1], [other], 1000).noise, whole.noise[:1])
    assert not torch.equal(whole.noise[0], whole.noise[1])


def test_draws_are_uniform_over_pictures_and_levels():
    many = draw(torch.zeros(2000, 1, 2, 2), [(0, 1, place) for place in range(2000)], 10, image_dropout=0.1)
    assert many.timesteps.bincount(minlength=10).float().std() < 3 * 200**0.5
    assert many.timesteps.float().mean().item() == pytest.approx(4.5, abs=0.3)
    assert many.conditional.float().mean().item() == pytest.approx(0.9, abs=0.02)
    assert many.noise.mean().item() == pytest.approx(0, abs=0.04)
    assert many.noise.var().item() == pytest.approx(1, abs=0.06)


def test_pooling_to_a_scale_that_is_none_is_refused():
    assert pool_to_tokens(torch.zeros(2, 256, 3), 4).shape == (2, 4, 3)
    with pytest.raises(ValueError, match="features of 256 tokens cannot be pooled to 9"):
        pool_to_tokens(torch.zeros(2, 256, 3), 9)
    with pytest.raises(ValueError, match="features of 16 tokens cannot be pooled to 64"):
        pool_to_tokens(torch.zeros(2, 16, 3), 64)


@torch.no_grad()
def test_standardized_projection_equals_projection_of_standardized_features():
    torch.manual_seed(0)
    features = torch.randn(40, 16, CHANNELS) * torch.linspace(0.1, 9, CHANNELS) + torch.linspace(-3, 5, CHANNELS)
    mean, std = feature_statistics(features.split(7), 4)
    tokens = pool_to_tokens(features, 4).flatten(0, 1)
    torch.testing.assert_close(mean, tokens.mean(0))
    torch.testing.assert_close(std, tokens.std(0, correction=0))

    unet = tiny_unet()
    expected = unet.encoder_hid_proj((tokens - mean) / std)
    standardize_projection(unet, mean, std)
    torch.testing.assert_close(unet.encoder_hid_proj(tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [1, 16])
def test_training_lowers_the_loss_and_saves_averaged_weights(tmp_path, num_tokens):
    unet = tiny_unet(num_tokens, use_position_table=num_tokens == 16)
    run = trainer(tmp_path, unet, max_steps=60, learning_rate=3e-3, ema_decay=0.9)
    before = run.evaluate()["eval_loss"]
    assert run.evaluate()["eval_loss"] == before
    run.train()
    assert run.evaluate()["eval_loss"] < before

    run.save_model()
    saved = PumaUNet2DConditionModel.from_pretrained(tmp_path)
    assert saved.config.num_tokens == num_tokens and "use_cache" not in saved.config
    for shadow, stored in zip(run.ema.shadow_params, saved.parameters(), strict=True):
        torch.testing.assert_close(shadow, stored, rtol=0, atol=0)
    assert not torch.equal(saved.conv_in.weight, unet.conv_in.weight)


def test_stock_arguments_are_taken_over(tmp_path):
    given = dict(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=5)
    stock = diffusers_puma.PumaDecoderTrainer(
        tiny_unet(),
        TrainingArguments(**given),
        noise_scheduler=DDPMScheduler(**VELOCITY),
        null_features=torch.zeros(1, 16, CHANNELS),
        train_dataset=rows(),
    )
    assert stock.args.to_dict() == PumaDecoderTrainingArguments(**given).to_dict()


def test_average_follows_its_formula(tmp_path):
    run = trainer(tmp_path, max_steps=1, ema_decay=0.9)
    start = run.model.conv_in.weight.detach().clone()
    run.train()
    with run.averaged_weights():
        # The first step of diffusers' EMAModel has a decay of 0, the second one of 2 / 11.
        torch.testing.assert_close(run.model.conv_in.weight, run.ema.shadow_params[0])
    assert not torch.equal(run.ema.shadow_params[0], start)
    first = run.ema.shadow_params[0].clone()
    with torch.no_grad():
        run.model.conv_in.weight.add_(1.0)
    run.ema.step(run.trained_parameters)
    torch.testing.assert_close(run.ema.shadow_params[0], first + 9 / 11)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_resumed_run_equals_unbroken_run(tmp_path, ema_decay):
    arguments = {"max_steps": 7, "ema_decay": ema_decay, "save_strategy": "steps", "save_steps": 3}
    unbroken = trainer(tmp_path / "unbroken", **arguments)
    unbroken.train()

    torch.manual_seed(123)
    resumed = trainer(tmp_path / "resumed", **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-3"))

    assert losses(resumed) == losses(unbroken)
    for expected, parameter in zip(unbroken.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=0)
    with unbroken.averaged_weights(), resumed.averaged_weights():
        for expected, parameter in zip(unbroken.model.parameters(), resumed.model.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected, rtol=0, atol=0)


def test_checkpoint_is_a_decoder_and_holds_the_weights_in_training(tmp_path):
    run = trainer(tmp_path, max_steps=3, ema_decay=0.9, save_strategy="steps", save_steps=3)
    run.train()
    checkpoint = tmp_path / "checkpoint-3"
    decoder = PumaUNet2DConditionModel.from_pretrained(checkpoint)
    torch.testing.assert_close(decoder.conv_in.weight, run.ema.shadow_params[0], rtol=0, atol=0)
    training = load_file(checkpoint / "training_weights.safetensors")
    torch.testing.assert_close(training["conv_in.weight"], run.model.conv_in.weight, rtol=0, atol=0)
    assert json.loads((checkpoint / "config.json").read_text())["_class_name"] == "PumaUNet2DConditionModel"
    assert not list(tmp_path.rglob("training_args.bin"))


@pytest.mark.parametrize("save_only_model", [False, True])
def test_best_checkpoint_is_loaded_with_its_average(tmp_path, save_only_model):
    run = trainer(
        tmp_path,
        max_steps=4,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        save_only_model=save_only_model,
    )
    run.train()
    best = PumaUNet2DConditionModel.from_pretrained(run.state.best_model_checkpoint)
    with run.averaged_weights():
        torch.testing.assert_close(run.model.conv_in.weight, best.conv_in.weight, rtol=0, atol=0)


def test_dropped_pictures_become_the_black_image_without_positions(tmp_path):
    unet = tiny_unet(16, use_position_table=True)
    run = trainer(tmp_path, unet, image_dropout=1.0)
    batch = {key: torch.stack([row[key] for row in rows(3)]) for key in ("latents", "features")} | {"first_place": 0}
    dropped = run.compute_loss(unet, batch)
    dropped.backward()
    assert unet.position_table.grad.abs().sum() == 0
    other = run.compute_loss(unet, {**batch, "features": torch.ones(3, 16, CHANNELS)})
    torch.testing.assert_close(dropped, other, rtol=0, atol=0)


def test_accumulated_loss_is_a_mean_and_bf16_runs(tmp_path):
    run = trainer(tmp_path, max_steps=2, gradient_accumulation_steps=4, bf16=True)
    run.train()
    assert all(0.2 < loss < 4 for loss in losses(run))


def test_activation_checkpointing_changes_nothing_but_memory(tmp_path):
    plain = trainer(tmp_path, max_steps=2)
    plain.train()
    checkpointed = trainer(tmp_path, max_steps=2, activation_checkpointing=True)
    checkpointed.train()
    assert checkpointed.model.is_gradient_checkpointing
    assert losses(checkpointed) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_dropout": 1.5}, "image_dropout must be between 0 and 1"),
        ({"ema_decay": 1.0}, "ema_decay must be at least 0 and below 1"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma must be positive"),
        ({"noise_offset": -1.0}, "noise_offset must be at least 0, got -1.0"),
        ({"resolution": 0}, "resolution must be at least 1, got 0"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 is for texts"),
        ({"schedule": {**EPSILON, "rescale_betas_zero_snr": True}}, "needs prediction_type 'v_prediction'"),
        ({"unet": "num_tokens=64"}, "features of 16 tokens cannot be pooled to 64"),
        ({"resolution": 64}, "resolution and image_processor are for rows of pictures"),
        ({"label_smoothing_factor": 0.3}, "the loss is that of denoising: label_smoothing_factor"),
        ({"unet": "frozen"}, "no weight of the decoder requires a gradient: add_adapter"),
        ({"unet": "two adapters"}, r"one adapter is trained and saved at a time, but \['a', 'b'\] are active"),
        ({"components": {"null_features": torch.zeros(16, CHANNELS)}}, r"\(1, tokens, 12\), got \(16, 12\)"),
        ({"components": {"null_features": torch.zeros(2, 16, CHANNELS)}}, r"\(1, tokens, 12\), got \(2, 16, 12\)"),
        ({"components": {"null_features": torch.zeros(1, 16, 11)}}, r"\(1, tokens, 12\), got \(1, 16, 11\)"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, arguments, message):
    if "unet" in arguments:
        kind, unet = arguments["unet"], tiny_unet()
        if kind == "num_tokens=64":
            unet = tiny_unet(64)
        elif kind == "frozen":
            unet.requires_grad_(False)
        else:
            for name in "ab":
                unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), name)
            unet.set_adapters(["a", "b"])
        arguments = {"unet": unet}
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(3, 8, 8)}, r"latents must be \(rows, 4, h, w\), got \(3, 3, 8, 8\)"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents must be \(rows, 4, h, w\), got \(3, 1, 4, 8, 8\)"),
        ({"features": torch.zeros(16, 11)}, r"features must be \(rows, tokens, 12\), got \(3, 16, 11\)"),
        ({"features": torch.zeros(CHANNELS)}, r"features must be \(rows, tokens, 12\), got \(3, 12\)"),
    ],
)
def test_rows_of_a_wrong_shape_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, train_dataset=[row | change for row in rows(3)]).train()


def test_rows_that_differ_or_lack_something_are_refused(tmp_path):
    smaller = {**rows(1)[0], "latents": torch.zeros(4, 4, 4)}
    with pytest.raises(ValueError, match=r"the shape of their latents, got \[\(4, 4, 4\), \(4, 8, 8\)\]"):
        trainer(tmp_path, train_dataset=[*rows(2), smaller]).train()
    with pytest.raises(ValueError, match=r"must hold latents and features.*got \['latents'\]"):
        trainer(tmp_path, train_dataset=[{"latents": row["latents"]} for row in rows(3)]).train()


@pytest.mark.parametrize("mixed_precision", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_decoder_in_half_precision_is_not_trained_whole(tmp_path, dtype, mixed_precision):
    with pytest.raises(ValueError, match=f"weights to train must be in torch.float32, got {dtype}"):
        trainer(tmp_path, tiny_unet().to(dtype), bf16=mixed_precision)


def test_compiled_training_computes_the_same_in_one_graph(tmp_path):
    smallest = {
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "mid_block_type": None,
    }
    plain = trainer(tmp_path, tiny_unet(**smallest), max_steps=2)
    plain.train()
    torch._dynamo.utils.counters.clear()
    compiled = trainer(tmp_path, tiny_unet(**smallest), max_steps=2, torch_compile=True, torch_compile_backend="eager")
    compiled.train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    compiled.save_model()
    assert PumaUNet2DConditionModel.from_pretrained(tmp_path).config.num_tokens == 4


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [4, 16])
def test_the_loss_is_that_of_its_draws(tmp_path, num_tokens):
    """Noise with its offset, dropped pictures that become the black one, and the weights of noise levels."""
    null = torch.randn(1, 16, CHANNELS, generator=torch.Generator().manual_seed(9))
    unet = tiny_unet(num_tokens, use_position_table=num_tokens == 16)
    options = {"noise_offset": 0.5, "image_dropout": 0.5, "min_snr_gamma": 5.0, "seed": 7}
    run = trainer(tmp_path, unet, components={"null_features": null}, **options)
    batch = {name: torch.stack([row[name] for row in rows(6)]) for name in ("latents", "features")}
    found = run.compute_loss(unet.train(), {**batch, "first_place": 3})

    drawn = draw(batch["latents"], [(7, 1, 3 + i) for i in range(6)], 1000, noise_offset=0.5, image_dropout=0.5)
    assert 0 < drawn.conditional.sum() < 6
    shown = torch.where(drawn.conditional[:, None, None], batch["features"], null)
    noisy = run.noise_scheduler.add_noise(batch["latents"], drawn.noise, drawn.timesteps)
    condition = {"conditional": drawn.conditional}
    prediction = unet(noisy, drawn.timesteps, pool_to_tokens(shown, num_tokens), added_cond_kwargs=condition).sample
    expected = denoising_loss(run.noise_scheduler, prediction, batch["latents"], *drawn[:2], min_snr_gamma=5.0)
    torch.testing.assert_close(found, expected)


def test_the_noise_that_is_drawn_has_its_offset():
    keys = [(0, 1, place) for place in range(2000)]
    many = draw(torch.zeros(2000, 1, 2, 2), keys, 10, noise_offset=0.5, image_dropout=0.1)
    assert many.noise.var().item() == pytest.approx(1 + 0.5**2, rel=0.06)
    assert many.noise.mean((2, 3)).var().item() == pytest.approx(1 / 4 + 0.5**2, rel=0.1)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 2), (1, 4)])
def test_accumulation_changes_nothing(tmp_path, batch_size, accumulation):
    options = {"max_steps": 3, "image_dropout": 0.3, "adam_epsilon": 1e-4}
    whole = trainer(tmp_path, per_device_train_batch_size=4, **options)
    whole.train()
    batches = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    parts = trainer(tmp_path, **batches, **options)
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_evaluation_does_not_depend_on_its_batches(tmp_path):
    found = [trainer(tmp_path, per_device_eval_batch_size=size).evaluate()["eval_loss"] for size in (4, 2, 1)]
    assert found == pytest.approx(found[:1] * 3, rel=1e-5)


def test_the_defaults_are_the_reports(tmp_path):
    """Appendix A.1.2; the files of `examples/configs` write every value out, so that they do not show these."""
    values = PumaDecoderTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    found = values.learning_rate, values.lr_scheduler_type.value, values.max_grad_norm
    assert (*found, values.noise_offset, values.image_dropout) == (8e-5, "linear", 1.0, 0.1, 0.1)
