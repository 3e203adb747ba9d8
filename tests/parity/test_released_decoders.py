"""Converted decoders against the numbers that the authors' own code gave, in every form that the weights come in.

`data/official_release_tiny` is a tiny checkpoint in the release's layout. fp16 weights have no such numbers: there the
reference is fp32 arithmetic on the rounded weights, in stock classes (`examples/verify_release.py`).
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionModel

from diffusers_puma import PumaPipeline, convert_released_decoders
from diffusers_puma.conversion import DECODERS, IMAGE_ENCODER, TOKEN_COUNTS, convert_released_unet
from examples.verify_release import (
    Settings,
    converted_results,
    direct_results,
    expected_results,
    main,
    max_errors,
    table,
    within_tolerance,
)

RELEASE = Path(__file__).parent / "data" / "official_release_tiny"
MODELS = [IMAGE_ENCODER, f"{DECODERS}/vae", *(f"{DECODERS}/unet_{count}" for count in TOKEN_COUNTS)]
Weights = dict[str, torch.Tensor]


def rewrite(release: Path, save: Callable[[Path, Weights], None], models: list[str] = MODELS) -> None:
    for model in models:
        (file,) = (release / model).glob("*.safetensors")
        weights = load_file(file)
        file.unlink()
        save(file, weights)


def as_is(release: Path) -> None:
    assert release.is_dir()


def as_bin(release: Path) -> None:
    names = {"model": "pytorch_model.bin"}
    rewrite(
        release, lambda file, weights: torch.save(weights, file.with_name(names.get(file.stem, f"{file.stem}.bin")))
    )


def as_shards(release: Path) -> None:
    rewrite(
        release,
        lambda file, weights: save_torch_state_dict(
            weights, file.parent, filename_pattern=f"{file.stem}{{suffix}}.safetensors", max_shard_size="100KB"
        ),
    )
    assert len(list((release / DECODERS / "unet_16").glob("*-of-*.safetensors"))) > 2


def as_bin_shards(release: Path) -> None:
    def save(file: Path, weights: Weights) -> None:
        pattern = "pytorch_model{suffix}.bin" if file.stem == "model" else f"{file.stem}{{suffix}}.bin"
        save_torch_state_dict(
            weights, file.parent, filename_pattern=pattern, max_shard_size="100KB", safe_serialization=False
        )

    rewrite(release, save)


def as_fp16(release: Path) -> None:
    rewrite(
        release, lambda file, weights: save_file({k: v.half() for k, v in weights.items()}, file, {"format": "pt"})
    )


def without_extra_config_keys(release: Path) -> None:
    for count in TOKEN_COUNTS:
        file = release / DECODERS / f"unet_{count}" / "config.json"
        config = json.loads(file.read_text())
        for key in ("mapping_dim", "mapping_dim1", "num_tokens", "use_embeds"):
            del config[key]
        file.write_text(json.dumps(config))


def with_unused_text_embedding(release: Path) -> None:
    unused = {"add_embedding.linear_1.weight": torch.ones(64, 8), "add_embedding.linear_1.bias": torch.ones(64)}
    unets = [model for model in MODELS if "unet_" in model]
    rewrite(release, lambda file, weights: save_file(weights | unused, file, {"format": "pt"}), unets)
    for unet in unets:
        file = release / unet / "config.json"
        config = json.loads(file.read_text()) | {"addition_embed_type": "text_time", "addition_time_embed_dim": 2}
        file.write_text(json.dumps(config | {"projection_class_embeddings_input_dim": 8}))


def with_another_scheduler_named(release: Path) -> None:
    file = release / DECODERS / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    sdxl = {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "use_karras_sigmas": False}
    file.write_text(json.dumps(config | sdxl))


def with_whole_clip(release: Path) -> None:
    """The encoder's folder as OpenAI publishes it, the text tower included."""
    folder = release / IMAGE_ENCODER
    vision = CLIPVisionModel.from_pretrained(folder)
    text = CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.config.to_dict()))
    clip.vision_model.load_state_dict({k.removeprefix("vision_model."): v for k, v in vision.state_dict().items()})
    clip.save_pretrained(folder)


FORMS = [
    as_is,
    as_bin,
    as_shards,
    as_bin_shards,
    as_fp16,
    without_extra_config_keys,
    with_unused_text_embedding,
    with_another_scheduler_named,
    with_whole_clip,
]


def release_copy(folder: Path) -> Path:
    return Path(shutil.copytree(RELEASE, folder / "release"))


@pytest.fixture(scope="module")
def parity_rows(request):
    """Collects what the parity tests measure and prints it as one table."""
    rows = []
    yield rows
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{table(rows)}")


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_parity(tmp_path, form, parity_rows):
    release, converted = release_copy(tmp_path), tmp_path / "converted"
    form(release)
    convert_released_decoders(release, converted)

    settings = Settings(**json.loads((RELEASE / "expected.json").read_text()))
    picture = Image.open(RELEASE / "input.png")
    rows = []
    for count in TOKEN_COUNTS:
        latents, expected = expected_results(RELEASE, count)
        if form is as_fp16:
            expected = direct_results(release, picture, count, latents, settings)
        rows.append(
            (
                form.__name__,
                count,
                max_errors(converted_results(converted, picture, count, latents, settings), expected),
            )
        )
    parity_rows += rows
    assert within_tolerance(rows)


def test_fp16_rounding_is_visible():
    """So that the fp16 parity above cannot pass on unrounded weights."""
    release = RELEASE / DECODERS / "unet_1" / "diffusion_pytorch_model.safetensors"
    weights = load_file(release)
    assert any((tensor.half().float() - tensor).abs().max() > 1e-5 for tensor in weights.values())


def test_decoders_keep_their_number_format_and_need_no_conversion_again(tmp_path):
    release = release_copy(tmp_path)
    as_fp16(release)
    convert_released_decoders(release, tmp_path / "converted")
    for scale, count in enumerate(TOKEN_COUNTS):
        weights = load_file(tmp_path / "converted" / f"unet_{scale}" / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
        assert ("position_table" in weights) == (count == 256)
    assert not list((tmp_path / "converted").rglob("*.bin"))
    assert not [file for file in (tmp_path / "converted").rglob("*.json") if str(tmp_path) in file.read_text()]
    assert PumaPipeline.from_pretrained(tmp_path / "converted").scales == [0, 1, 2, 3, 4]


def test_verify_release_prints_the_table(tmp_path, capsys):
    release = release_copy(tmp_path)
    assert main([str(release), str(release / "input.png"), "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert output.count("stock classes") == output.count("authors' code") == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release"]


class Code:
    """What a malicious `.bin` would hold: something that runs when it is unpickled."""

    def __reduce__(self):
        return print, ("ran",)


def test_no_code_is_unpickled(tmp_path, capsys):
    release = release_copy(tmp_path)
    file = release / DECODERS / "unet_16" / "diffusion_pytorch_model.bin"
    file.with_suffix(".safetensors").unlink()
    torch.save({"conv_in.weight": Code()}, file)
    with pytest.raises(ValueError, match=r"unet_16/diffusion_pytorch_model\.bin cannot be read as a file of tensors"):
        convert_released_decoders(release, tmp_path / "converted")
    assert "ran" not in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release"]


@pytest.mark.parametrize("missing", [*MODELS, f"{DECODERS}/scheduler", f"{DECODERS}/unet_4/config.json"])
def test_missing_parts_are_named(tmp_path, missing):
    release = release_copy(tmp_path)
    path = release / missing
    path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(FileNotFoundError, match=f"{missing} is missing"):
        convert_released_decoders(release, tmp_path / "converted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.pop("mapping_layer.weight"),
            "is no PUMA decoder: its weights lack mapping_layer.weight",
        ),
        (lambda weights: weights.pop("mapping_layer.bias"), "mapping_layer.bias is missing"),
        (lambda weights: weights.pop("conv_in.bias"), "conv_in.bias is missing"),
        (lambda weights: weights.pop("embed_img_pos"), "embed_img_pos is missing"),
        (lambda weights: weights.update(another=torch.ones(1)), "another is not known"),
        (
            lambda weights: weights.update({"conv_in.bias": torch.ones(7)}),
            r"conv_in.bias has shape \(7,\), not \(16,\)",
        ),
    ],
)
def test_wrong_weights_are_named(tmp_path, change, message):
    folder = release_copy(tmp_path) / DECODERS / "unet_256"
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    with pytest.raises(ValueError, match=f"{folder}.*{message}"):
        convert_released_unet(folder, num_tokens=256)


def test_missing_shard_is_named(tmp_path):
    release = release_copy(tmp_path)
    as_shards(release)
    shard = sorted((release / DECODERS / "unet_1").glob("*-of-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard} is missing"):
        convert_released_unet(shard.parent, num_tokens=1)


@pytest.mark.parametrize("model", MODELS)
def test_incomplete_encoder_and_vae_are_refused(tmp_path, model):
    release = release_copy(tmp_path)

    def drop_one(file: Path, weights: Weights) -> None:
        weights.pop(sorted(weights)[-1])
        save_file(weights, file, {"format": "pt"})

    rewrite(release, drop_one, [model])
    with pytest.raises(ValueError, match=model):
        convert_released_decoders(release, tmp_path / "converted")


def test_destination_must_be_empty(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileExistsError, match="full must be a new or an empty folder"):
        convert_released_decoders(RELEASE, tmp_path / "full")
    convert_released_decoders(RELEASE, tmp_path / "empty")
    assert (tmp_path / "empty" / "model_index.json").is_file()
