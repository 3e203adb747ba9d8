"""What the decoder trainer pushes loads from the Hub, while it trains and after."""

import sys
from pathlib import Path

import pytest
import torch

from tests.hub_server import HubServer

from .tiny import tiny_unet, trainer


def pushed(name: str, folder: Path, unet: torch.nn.Module):
    """The trainer after a training that pushed its checkpoints, the last of them at its end."""
    options = {"push_to_hub": True, "hub_model_id": f"tester/{name}", "hub_always_push": True}
    run = trainer(folder / name, unet, save_strategy="steps", save_steps=2, max_steps=4, ema_decay=0.5, **options)
    run.train()
    run._finish_current_push()
    return run


def check_decoder(folder: Path) -> None:
    from huggingface_hub import HfApi, ModelCard

    from diffusers_puma import PumaUNet2DConditionModel

    def check_repository() -> None:
        loaded = PumaUNet2DConditionModel.from_pretrained("tester/decoder", force_download=True).state_dict()
        with run.averaged_weights():
            for name, weight in run.model.state_dict().items():
                torch.testing.assert_close(loaded[name], weight)

    run = pushed("decoder", folder, tiny_unet())
    check_repository()
    run.push_to_hub()
    check_repository()
    assert "model.safetensors" not in HfApi().list_repo_files("tester/decoder")
    assert ModelCard.load("tester/decoder").data["library_name"] == "diffusers"


def check_adapter(folder: Path) -> None:
    from huggingface_hub import ModelCard
    from peft import LoraConfig, get_peft_model_state_dict

    from diffusers_puma.loading import fetch_lora_state_dict

    def check_repository() -> None:
        loaded, _ = fetch_lora_state_dict("tester/adapter", force_download=True)
        with run.averaged_weights():
            expected = get_peft_model_state_dict(run.model, adapter_name="default")
            assert loaded.keys() == {f"unet_{run.scale}.{name}" for name in expected}
            for name, weight in expected.items():
                torch.testing.assert_close(loaded[f"unet_{run.scale}.{name}"], weight)

    unet = tiny_unet()
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    run = pushed("adapter", folder, unet)
    check_repository()
    run.push_to_hub()
    check_repository()
    card = ModelCard.load("tester/adapter").data
    assert card["library_name"] == "diffusers" and "lora" in card.tags


@pytest.mark.parametrize("check", [check_decoder, check_adapter], ids=lambda check: check.__name__)
def test_a_training_pushes_what_loads(tmp_path, check):
    with HubServer(tmp_path / "hub") as hub:
        hub.run("tests.diffusers_puma.training.test_hub", check.__name__, str(tmp_path))


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
