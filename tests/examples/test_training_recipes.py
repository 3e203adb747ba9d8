"""The report's values in the YAML files, and the small version of every stage, run from its own file."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, AutoProcessor

from diffusers_puma import PumaPipeline, PumaUNet2DConditionModel
from tests.test_hub_round_trip import build_model, build_pipeline, build_processor
from tests.tracking import pictures, read_events, texts
from transformers_puma import PumaConfig, PumaForConditionalGeneration

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = EXAMPLES / "configs"
sys.path[:0] = [str(EXAMPLES), str(CONFIGS / "small")]

import make_data  # noqa: E402
import pretrain  # noqa: E402
import tune  # noqa: E402
from training_recipe import DataArguments, parse_recipe  # noqa: E402

# By its path: examples/emoji has a script of the same name.
_spec = importlib.util.spec_from_file_location("examples_train_decoder", EXAMPLES / "train_decoder.py")
train_decoder = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = train_decoder
_spec.loader.exec_module(train_decoder)

SCRIPTS = {
    "decoders": train_decoder,
    "pretraining": pretrain,
    "text_to_image": tune,
    "editing": tune,
    "conditional": tune,
    "understanding": tune,
}
# Report, appendix A: global batch, steps, learning rate, warm-up, schedule.
REPORT = {
    "decoders": (1024, None, 8e-5, None, "linear"),
    "pretraining": (2048, 100_000, 3e-5, 2000, "cosine"),
    "text_to_image": (2048, 20_000, 1e-5, 1000, "cosine"),
    "editing": (1024, 10_000, 1e-5, 500, "cosine"),
    "conditional": (1024, 20_000, 1e-5, 500, "cosine"),
    "understanding": (512, None, 1e-5, 500, "cosine"),
}
FEW_STEPS = ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--disable_tqdm", "true"]
SILENT = ["--report_to", "none"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    make_data.main(["--out", str(folder)])
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """In place of the model that the small configurations name: of its kind, but smaller."""
    folder = tmp_path_factory.mktemp("model")
    build_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("stage", REPORT)
def test_values_of_the_report(stage):
    text = (CONFIGS / f"{stage}.yaml").read_text()
    values = yaml.safe_load(text)
    batch, steps, learning_rate, warmup, schedule = REPORT[stage]
    gpus = int(re.search(r"(\d+) GPUs", text)[1])
    assert values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * gpus == batch
    assert values["learning_rate"] == learning_rate and values["lr_scheduler_type"] == schedule
    assert values.get("warmup_steps") == warmup
    assert steps is None or values["max_steps"] == steps
    if stage == "decoders":
        assert values["steps_per_scale"] == [40_000, 30_000, 20_000, 15_000, 10_000]
        assert (values["noise_offset"], values["image_dropout"], values["max_grad_norm"]) == (0.1, 0.1, 1.0)
    if stage == "pretraining":
        assert (values["projector_learning_rate"], values["max_grad_norm"]) == (1e-4, 5.0)


@pytest.mark.parametrize("stage", REPORT)
def test_the_small_version_names_the_same_sources(stage):
    whole, small = (yaml.safe_load((CONFIGS / folder / f"{stage}.yaml").read_text()) for folder in ("", "small"))
    for key in ("name", "task", "weight"):
        assert [source.get(key) for source in small["sources"]] == [source.get(key) for source in whole["sources"]]
    assert small["stage"] == whole["stage"] and small["lr_scheduler_type"] == whole["lr_scheduler_type"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_key_is_an_argument(path, monkeypatch):
    """The scripts refuse a file with any other."""
    script = SCRIPTS.get(path.stem, tune)
    seen = []
    monkeypatch.setattr(script, "parse_recipe", lambda types, argv: seen.append(parse_recipe(types, argv)) or stop())
    with pytest.raises(InterruptedError):
        scale = ["--scale", "3"] if script is train_decoder else []
        script.main([str(path), "--use_cpu", "true", "--bf16", "false", "--learning_rate", "0.5", *scale])
    arguments, source, data, *_ = seen[0]
    assert arguments.learning_rate == 0.5 and not arguments.bf16  # the command line wins
    assert source.model == yaml.safe_load(path.read_text())["model"]
    assert isinstance(data, DataArguments) and data.sources


def stop():
    raise InterruptedError


@pytest.mark.parametrize("stage", REPORT)
def test_the_small_version_runs(stage, data, model, tmp_path, capsys):
    config = str(CONFIGS / "small" / f"{stage}.yaml")
    options = ["--model", model, "--data_root", data, "--output_dir", str(tmp_path), "--use_cpu", "true", *FEW_STEPS]
    if stage == "decoders":
        options += ["--scale", "1", "--resolution", "8", "--sample_steps", "1"]
    else:
        options += ["--sample_decoders", model, "--sample_scale", "1"]
    SCRIPTS[stage].main([config, *options, "--eval_steps", "2"])
    folder = tmp_path / "unet_1" if stage == "decoders" else tmp_path

    metrics = json.loads((folder / "train_results.json").read_text())
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [float(entry["loss"]) for entry in log if "loss" in entry]
    assert len(losses) == 4 and all(loss == loss for loss in losses)
    assert (metrics["first_loss"], metrics["last_loss"]) == (losses[0], losses[-1])
    if stage == "decoders":
        trained, start = PumaUNet2DConditionModel.from_pretrained(folder), build_pipeline().unet_1
        pipe = PumaPipeline.from_pretrained(model, unet_1=trained)
        assert pipe("a cat", scale=1, num_inference_steps=1).images
    else:
        trained = AutoModelForMultimodalLM.from_pretrained(folder)
        start = build_pipeline().mllm
        assert AutoProcessor.from_pretrained(folder).image_seq_length == 21
    events = read_events(tmp_path)
    evaluated = {event.step: event.value for event in events.Scalars("eval/loss")}
    assert evaluated.keys() == {0, 2, 4}
    assert (metrics["first_eval_loss"], metrics["last_eval_loss"]) == pytest.approx((evaluated[0], evaluated[4]))
    for i in range(2):
        assert texts(events, f"samples/{i}").keys() == {0, 2, 4}
        shown = pictures(events, f"samples/{i}")[4]
        if stage in ("decoders", "text_to_image", "editing", "conditional"):
            assert (shown[..., -8:] != 255).any()  # what was drawn is the rightmost

    before = start.state_dict()
    changed = {name for name, value in trained.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and not any("vision_tower" in name for name in changed)


def test_the_same_command_goes_on(data, model, tmp_path):
    """Stopped at step 2, as after a kill, and started again: the losses of a run that was never stopped."""
    options = ["--model", model, "--data_root", data, "--use_cpu", "true", *FEW_STEPS, *SILENT]
    losses = {}
    for name, limits in {"broken": ["2", "4"], "whole": ["4"]}.items():
        for limit in limits:
            # The rate of every step must not depend on where the run ends.
            steps = ["--max_steps", limit, "--lr_scheduler_type", "constant", "--output_dir", str(tmp_path / name)]
            pretrain.main([str(CONFIGS / "small" / "pretraining.yaml"), *options, *steps])
        log = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses[name] = [float(entry["loss"]) for entry in log if "loss" in entry]
    assert losses["broken"] == losses["whole"] and len(losses["whole"]) == 4


def test_tuning_through_lora(data, model, tmp_path):
    config = str(CONFIGS / "small" / "editing.yaml")
    options = ["--model", model, "--data_root", data, "--output_dir", str(tmp_path), "--use_cpu", "true", *FEW_STEPS]
    tune.main([config, *options, *SILENT, "--lora_r", "2"])
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "model.safetensors").exists()
    adapted = PeftModel.from_pretrained(AutoModelForMultimodalLM.from_pretrained(model), tmp_path)
    assert adapted.peft_config["default"].lora_alpha == 4


def test_tuning_in_four_bits(data, tmp_path):
    """Rows of weights must be as long as the blocks that share a scale, 64."""
    config = build_model().config.to_dict()
    config["text_config"] |= {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    PumaForConditionalGeneration(PumaConfig.from_dict(config)).save_pretrained(tmp_path / "model")
    build_processor().save_pretrained(tmp_path / "model")
    four_bits = ["--lora_r", "2", "--load_in_4bit", "true"]
    options = ["--data_root", data, "--use_cpu", "true", *FEW_STEPS, *SILENT, *four_bits]
    folders = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    tune.main([str(CONFIGS / "small" / "editing.yaml"), *folders, *options])
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any("lora_A" in name for name in saved) and not any("base_layer" in name for name in saved)


def test_four_bits_need_an_adapter(data, model, tmp_path):
    config = str(CONFIGS / "small" / "editing.yaml")
    options = ["--model", model, "--data_root", data, "--output_dir", str(tmp_path), "--use_cpu", "true"]
    with pytest.raises(ValueError, match="load_in_4bit=True freezes the model: give lora_r"):
        tune.main([config, *options, "--load_in_4bit", "true"])


def test_the_encoder_of_a_pipeline_with_and_without_a_language_model(model, tmp_path):
    """With the latter, such as converted decoders, it is a component of its own."""
    pipe = PumaPipeline.from_pretrained(model, scales=[1])
    parts = {"vae": pipe.vae, "scheduler": pipe.scheduler, "unet_1": pipe.unet_1}
    PumaPipeline(image_encoder=pipe.mllm.model.vision_tower, **parts).save_pretrained(tmp_path)
    within, image_processor = train_decoder.load_own_encoder(model)
    alone, no_processor = train_decoder.load_own_encoder(str(tmp_path))
    assert image_processor.image_mean == pipe.processor.image_processor.image_mean and no_processor is None
    for name, weight in pipe.mllm.model.vision_tower.state_dict().items():
        assert torch.equal(within.state_dict()[name], weight) and torch.equal(alone.state_dict()[name], weight)


def test_a_misspelt_key_is_refused(tmp_path):
    (tmp_path / "bad.yaml").write_text("model: x\nstage: editing\nsources: []\noutput_dir: y\nlerning_rate: 1\n")
    with pytest.raises(ValueError, match="lerning_rate"):
        tune.main([str(tmp_path / "bad.yaml")])
