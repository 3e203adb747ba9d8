"""Damaged sources of `puma convert` and `puma init`: one line that names the file, before any work is done."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from puma_cli import main
from tests.diffusers_puma.test_initialization import ENCODER, RELEASE, make_language_model, make_plain_pipeline
from tests.parity.test_released_decoders import Code, as_bin, as_shards
from tests.test_puma_files import POINTER

DECODERS, IMAGE_ENCODER = "ckpts/stable-diffusion-xl-base-1.0", "ckpts/clip-vit-large-patch14"
LAST = f"{DECODERS}/unet_1"
WEIGHTS = "diffusion_pytorch_model.safetensors"
NO_WEIGHTS = "is no complete safetensors file"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def point(file: Path) -> None:
    file.write_bytes(POINTER)


def empty(file: Path) -> None:
    file.write_text("{}")


def open_brace(file: Path) -> None:
    file.write_text("{")


def set_config(**changes):
    def change(file: Path) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def put_code(file: Path) -> None:
    file.unlink()
    torch.save({"a": Code()}, file.with_name("pytorch_model.bin"))


def put_cut_bin(file: Path) -> None:
    weights = load_file(file)
    file.unlink()
    torch.save(weights, file.with_name("pytorch_model.bin"))
    cut(file.with_name("pytorch_model.bin"))


@pytest.fixture
def fails(tmp_path, capsys):
    """`fails(text, *arguments)`: the last line on stderr is an error with `text`; nothing was done or is left."""

    def call(text: str, *arguments) -> None:
        before = sorted(tmp_path.rglob("*"))
        assert main([*map(str, arguments), str(tmp_path / "out")]) == 2
        out, err = capsys.readouterr()
        *bars, message = err.removesuffix("\n").split("\n")
        assert message.startswith("puma: error: ") and text in message
        assert not out and not any("converted" in bar or "in place" in bar for bar in bars)
        assert sorted(tmp_path.rglob("*")) == before

    return call


class TestConvert:
    @pytest.mark.parametrize(
        ("file", "damage", "text"),
        [
            (f"{LAST}/{WEIGHTS}", cut, f"{LAST}/{WEIGHTS} {NO_WEIGHTS}"),
            (f"{DECODERS}/vae/{WEIGHTS}", point, f"vae/{WEIGHTS} {NO_WEIGHTS}"),
            (f"{IMAGE_ENCODER}/model.safetensors", point, f"{IMAGE_ENCODER}/model.safetensors {NO_WEIGHTS}"),
            (f"{IMAGE_ENCODER}/model.safetensors", put_code, f"{IMAGE_ENCODER} cannot be read: it holds something"),
            (f"{IMAGE_ENCODER}/model.safetensors", put_cut_bin, f"{IMAGE_ENCODER} cannot be read: RuntimeError"),
            (f"{IMAGE_ENCODER}/config.json", set_config(hidden_size=64), "embeddings.class_embedding has shape (32,)"),
            (f"{IMAGE_ENCODER}/config.json", set_config(num_attention_heads=7), "not a multiple"),
            (f"{LAST}/config.json", open_brace, f"{LAST}/config.json is not valid JSON"),
            (f"{LAST}/config.json", set_config(block_out_channels=5), f"{LAST}/config.json describes no UNet"),
            (f"{LAST}/config.json", set_config(layers_per_block=5), f"{LAST} do not fit its config"),
            (f"{DECODERS}/vae/config.json", set_config(latent_channels=5), f"{DECODERS}/vae do not fit its config"),
            (f"{DECODERS}/scheduler/scheduler_config.json", open_brace, "scheduler_config.json is not valid JSON"),
        ],
    )
    def test_damaged_part(self, fails, tmp_path, file, damage, text):
        release = shutil.copytree(RELEASE, tmp_path / "release")
        damage(release / file)
        fails(text, "convert", release)

    def test_damaged_part_in_another_form(self, fails, tmp_path):
        release = shutil.copytree(RELEASE, tmp_path / "release")
        as_shards(release)
        empty(release / LAST / f"{WEIGHTS}.index.json")
        fails(f"{WEIGHTS}.index.json is no index of weights", "convert", release)
        release = shutil.copytree(RELEASE, tmp_path / "binary")
        as_bin(release)
        cut(release / LAST / "diffusion_pytorch_model.bin")
        fails(f"{LAST}/diffusion_pytorch_model.bin cannot be read as a file of tensors", "convert", release)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A language model, a plain pipeline, and a whole PUMA made of the release."""
    folder = tmp_path_factory.mktemp("sources")
    make_language_model(folder / "llm")
    make_plain_pipeline(folder / "plain")
    arguments = {"--llm": folder / "llm", "--vision": ENCODER, "--decoders": RELEASE, "--out": folder / "puma"}
    assert main(["init", *(str(word) for pair in arguments.items() for word in pair)]) == 0
    return folder


class TestInit:
    @pytest.fixture
    def fails_with_decoders(self, fails, sources, tmp_path):
        """The language model has no weights, so nothing can have been read before the decoders were checked."""
        llm = shutil.copytree(sources / "llm", tmp_path / "llm")
        (llm / "model.safetensors").unlink()

        def call(text: str, decoders: Path) -> None:
            fails(text, "init", "--llm", llm, "--vision", ENCODER, "--decoders", decoders, "--out")

        return call

    @pytest.mark.parametrize("part", ["plain/unet", "plain/vae", "puma/unet_4", "puma/vae"])
    @pytest.mark.parametrize(
        ("file", "damage", "text"),
        [
            (WEIGHTS, Path.unlink, f"holds no {WEIGHTS}"),
            (WEIGHTS, point, NO_WEIGHTS),
            (WEIGHTS, cut, NO_WEIGHTS),
            ("config.json", open_brace, "config.json is not valid JSON"),
            ("config.json", Path.unlink, "config.json is missing"),
        ],
    )
    def test_damaged_decoders(self, fails_with_decoders, sources, tmp_path, part, file, damage, text):
        kind, name = part.split("/")
        shutil.copytree(sources / kind, tmp_path / kind)
        damage(tmp_path / part / file)
        fails_with_decoders(f"{tmp_path / part}", tmp_path / kind)
        fails_with_decoders(text, tmp_path / kind)

    @pytest.mark.parametrize(
        ("file", "damage", "text"),
        [
            ("unet_4/config.json", empty, "unet_4/config.json describes no decoder of PUMA"),
            ("scheduler/scheduler_config.json", Path.unlink, "scheduler/scheduler_config.json is missing"),
            ("mllm/model.safetensors", point, f"mllm/model.safetensors {NO_WEIGHTS}"),
            ("model_index.json", open_brace, "model_index.json is not valid JSON"),
        ],
    )
    def test_damaged_pipeline(self, fails_with_decoders, sources, tmp_path, file, damage, text):
        puma = shutil.copytree(sources / "puma", tmp_path / "puma")
        damage(puma / file)
        fails_with_decoders(text, puma)

    def test_damaged_release(self, fails_with_decoders, tmp_path):
        release = shutil.copytree(RELEASE, tmp_path / "release")
        point(release / LAST / WEIGHTS)
        fails_with_decoders(f"{LAST}/{WEIGHTS} {NO_WEIGHTS}", release)

    @pytest.mark.parametrize("part", ["unet", "vae"])
    def test_config_of_another_model(self, sources, tmp_path, capsys, part):
        plain = shutil.copytree(sources / "plain", tmp_path / "plain")
        set_config(block_out_channels=5)(plain / part / "config.json")
        arguments = {"--llm": sources / "llm", "--vision": ENCODER, "--decoders": plain, "--out": tmp_path / "out"}
        assert main(["init", *(str(word) for pair in arguments.items() for word in pair)]) == 2
        assert f"{plain / part}" in capsys.readouterr().err.splitlines()[-1]
