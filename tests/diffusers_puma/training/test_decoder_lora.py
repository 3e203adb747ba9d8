import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

from tests.killing import losses

from ..conftest import TOKENS, make_unet
from .tiny import trainer

SCALE, CHANNELS = 3, 32
ARGUMENTS = {"max_steps": 7, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1}


def lora_trainer(folder, rank: int = 2, null_tokens: int = TOKENS[0], dtype=torch.float32, scale=None, **arguments):
    unet = make_unet(SCALE).to(dtype)
    torch.manual_seed(3)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=8, target_modules=["to_q", "to_v", "encoder_hid_proj"]))
    generator = torch.Generator().manual_seed(0)
    shapes = {"latents": (4, 8, 8), "features": (TOKENS[0], CHANNELS)}
    rows = [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(6)]
    components = {"null_features": torch.zeros(1, null_tokens, CHANNELS), "scale": scale}
    return trainer(folder, unet, train_dataset=rows, components=components, **{**ARGUMENTS, **arguments})


@torch.no_grad()
def predict(unet) -> torch.Tensor:
    torch.manual_seed(7)
    sample, features = torch.randn(2, 4, 8, 8), torch.randn(2, TOKENS[SCALE], CHANNELS)
    return unet.eval()(sample, torch.tensor(500), features).sample


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_adapter_alone_is_saved_and_the_pipeline_loads_it(tmp_path, decoder_pipeline, ema_decay):
    run = lora_trainer(tmp_path, ema_decay=ema_decay)
    before = {name: weight.clone() for name, weight in run.model.named_parameters()}
    plain = predict(decoder_pipeline.unet_3)
    run.train()
    run.save_model()
    changed = {n for n, weight in run.model.named_parameters() if not torch.equal(weight, before[n])}
    assert changed and all("lora_" in name for name in changed)

    assert not list(tmp_path.rglob("diffusion_pytorch_model*"))
    weights = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert weights and all(name.startswith(f"unet_{SCALE}.") and ".lora_" in name for name in weights)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        assert "lora_alpha" in str(file.metadata())

    decoder_pipeline.load_lora_weights(tmp_path, scale=SCALE)
    with run.averaged_weights():
        expected = predict(run.model)
    torch.testing.assert_close(predict(decoder_pipeline.unet_3), expected)
    assert not torch.allclose(expected, plain, atol=1e-3)


def test_resumed_adapter_equals_unbroken_one(tmp_path):
    unbroken = lora_trainer(tmp_path / "unbroken", ema_decay=0.9)
    unbroken.train()
    resumed = lora_trainer(tmp_path / "resumed", ema_decay=0.9)
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-3"))
    assert losses(resumed) == losses(unbroken)
    for ours, theirs in zip(resumed.ema.shadow_params, unbroken.ema.shadow_params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    weights = load_file(tmp_path / "unbroken" / "checkpoint-3" / "training_weights.safetensors")
    assert weights.keys() == unbroken.trained.keys() and all("lora_" in name for name in weights)


def test_adapter_of_another_rank_is_refused(tmp_path):
    lora_trainer(tmp_path, max_steps=3, ema_decay=0.0).train()
    with pytest.raises(RuntimeError, match="size mismatch"):
        lora_trainer(tmp_path, rank=4, ema_decay=0.0).train(resume_from_checkpoint=True)


def test_adapter_of_a_decoder_in_half_precision_is_trained_in_full(tmp_path):
    run = lora_trainer(tmp_path, dtype=torch.bfloat16, bf16=True, ema_decay=0.9)
    run.train()
    run.save_model()
    assert run.model.conv_in.weight.dtype == torch.bfloat16
    trained = [*run.trained_parameters, *run.ema.shadow_params]
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors").values()
    assert {weight.dtype for weight in (*trained, *saved)} == {torch.float32}
    with pytest.raises(ValueError, match="decoder in torch.bfloat16 needs mixed precision: pass bf16=True"):
        lora_trainer(tmp_path, dtype=torch.bfloat16)


def test_scale_that_pooled_null_features_do_not_tell(tmp_path):
    with pytest.raises(ValueError, match="features have 256 tokens, and the finest scale 4, going by null_features"):
        lora_trainer(tmp_path, null_tokens=TOKENS[SCALE]).train()
    run = lora_trainer(tmp_path, null_tokens=TOKENS[SCALE], scale=SCALE, max_steps=1)
    run.train()
    run.save_model()
    weights = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert all(name.startswith(f"unet_{SCALE}.") for name in weights)
    with pytest.raises(ValueError, match="null_features have 256 tokens, the finest scale has 16"):
        lora_trainer(tmp_path, scale=1)
    with pytest.raises(ValueError, match="scale must be 0..4, got '3'"):
        lora_trainer(tmp_path, scale="3")
