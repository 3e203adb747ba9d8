"""The first two training stages of the small model, at a few steps on drawn pictures."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import CLIPVisionModel

from transformers_puma.image_processing_puma import PumaImageProcessor
from transformers_puma.training.checkpoints import write_manifest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "emoji"))

import train_encoder  # noqa: E402
import train_vae  # noqa: E402
from build_dataset import FEATURES, load_emoji  # noqa: E402
from emoji_training import (  # noqa: E402
    EmojiPictures,
    compose_pairs,
    jitter,
    parse_arguments,
    psnr,
    psnr_where,
    recolour,
)

STEPS = ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--disable_tqdm", "true"]


def row(name: str, style: str, colour: str, base: str) -> dict:
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    (draw.ellipse if style == "round" else draw.rectangle)((16, 16, 48, 48), fill=colour)
    text = {column: "" for column in ("group", "subgroup", "tone", "gender")}
    return {"image": image, "style": style, "tags": [colour], "name": name, "codepoints": name, "base": base, **text}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    colours = ["red", "green", "blue", "orange", "purple", "black"]
    train = [row(f"{c} thing", style, c, c) for c in colours for style in ("round", "square")]
    train += [row("pale red thing", "round", "pink", "red")]
    splits = {
        "train": train,
        "heldout_concept": [row("brown thing", "round", "brown", "brown")],
        "heldout_pair": [row("grey thing", style, "grey", "grey") for style in ("round", "square")],
    }
    path = tmp_path_factory.mktemp("data") / "emoji"
    DatasetDict({k: Dataset.from_list(rows, features=FEATURES) for k, rows in splits.items()}).save_to_disk(str(path))
    return str(path)


def resumes_exactly(main, arguments: list[str], out: Path, weights: str) -> None:
    """Runs to the end; then undoes what a kill while step 4's checkpoint was written would have lost; runs again."""
    main([*arguments, "--out", str(out)])
    whole = load_file(out / weights)
    losses = [entry["loss"] for entry in json.loads((out / "training.json").read_text())["log"] if "loss" in entry]
    assert len(losses) == 4

    shutil.rmtree(out)
    checkpoints = Path(f"{out}.checkpoints")
    (checkpoints / "checkpoint-4" / "trainer_state.json").unlink()
    state_file = checkpoints / "checkpoint-2" / "trainer_state.json"
    state = json.loads(state_file.read_text())
    state["log_history"].append({"step": 2, "mark": "read from checkpoint-2"})
    state_file.write_text(json.dumps(state))
    write_manifest(state_file.parent)
    main([*arguments, "--out", str(out)])
    resumed = load_file(out / weights)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    log = json.loads((out / "training.json").read_text())["log"]
    assert [entry["loss"] for entry in log if "loss" in entry] == losses
    assert any("mark" in entry for entry in log)  # it went on from there and did not start anew


def test_vae_stage_trains_resumes_and_is_skipped_when_finished(data, tmp_path, capsys):
    out = tmp_path / "vae"
    arguments = ["--data", data, *STEPS, "--per_device_train_batch_size", "4"]
    resumes_exactly(train_vae.main, arguments, out, "diffusion_pytorch_model.safetensors")

    vae = AutoencoderKL.from_pretrained(out)
    pictures = EmojiPictures(load_emoji(data)["train"])
    assert vae.config.scaling_factor == pytest.approx(1 / train_vae.latent_std(vae, pictures), rel=0.05)
    pixels = pictures[torch.arange(4)]
    assert vae.encode(2 * pixels - 1).latent_dist.mode().shape == (4, 4, 16, 16)
    assert train_vae.round_trip(vae, pixels).shape == pixels.shape

    written = (out / "config.json").stat().st_mtime_ns
    train_vae.main([*arguments, "--out", str(out)])
    assert "trained already" in capsys.readouterr().out
    assert (out / "config.json").stat().st_mtime_ns == written
    assert not Path(f"{out}.partial").exists()


def test_vae_decoder_alone_is_trained_on_so_that_its_latents_stay(data, tmp_path):
    start, out = tmp_path / "start", tmp_path / "vae"
    torch.manual_seed(0)
    vae = train_vae.build_vae()
    vae.register_to_config(scaling_factor=0.7)
    vae.save_pretrained(start)
    train_vae.main(["--data", data, *STEPS, "--pretrained", str(start), "--out", str(out)])

    before, after = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (start, out))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    assert AutoencoderKL.from_pretrained(out).config.scaling_factor == 0.7


def test_encoder_stage_trains_over_the_change_of_resolution_and_resumes(data, tmp_path):
    out = tmp_path / "encoder"
    arguments = ["--data", data, *STEPS, "--per_device_train_batch_size", "4", "--low_resolution_steps", "3"]
    resumes_exactly(train_encoder.main, arguments, out, "model.safetensors")

    vision = CLIPVisionModel.from_pretrained(out)
    processor = PumaImageProcessor.from_pretrained(out)
    image = load_emoji(data)["train"][0]["image"]
    pixel_values = processor([image], return_tensors="pt")["pixel_values"]
    assert vision(pixel_values).last_hidden_state[:, 1:].shape == (1, 256, 128)
    measured = json.loads((out / "training.json").read_text())["measured"]
    assert len(measured["pixel_psnr_per_scale"]["heldout_concept"]) == 5
    assert not any(name.startswith(("text", "pixel_heads")) for name in load_file(out / "model.safetensors"))


def tiny_task(texts: list[dict]) -> tuple:
    torch.manual_seed(0)
    tokenizer = train_encoder.build_tokenizer(texts, vocabulary=300)
    vision = train_encoder.build_vision(width=32, layers=1, heads=2)
    return train_encoder.EncoderTask(vision, train_encoder.build_text(tokenizer, width=32, layers=1)), tokenizer


def test_encoder_task_sees_what_the_image_processor_gives(data):
    pictures = EmojiPictures(load_emoji(data)["train"])
    task, _ = tiny_task(pictures.texts)
    image = load_emoji(data)["train"][0]["image"]
    size = {"height": 64, "width": 64}
    pixel_values = PumaImageProcessor(size=size)([image], return_tensors="pt")["pixel_values"]
    expected = task.vision(pixel_values).last_hidden_state[:, 1:]
    features = task.encode(pictures[torch.tensor([0])])
    torch.testing.assert_close(features[0], expected, atol=1e-5, rtol=1e-5)
    assert [scale.shape[1] for scale in features] == [256, 64, 16, 4, 1]
    assert [scale.shape[1] for scale in task.encode(torch.rand(1, 3, 32, 32))] == [64, 16, 4, 1]


def test_every_trained_weight_gets_a_gradient(data):
    pictures = EmojiPictures(load_emoji(data)["train"])
    task, tokenizer = tiny_task(pictures.texts)
    words = train_encoder.tokenize(tokenizer, [train_encoder.caption(text) for text in pictures.texts[:4]])
    task(pictures[torch.arange(4)], **words)["loss"].backward()
    assert [n for n, p in task.named_parameters() if p.requires_grad and p.grad is None] == []


def test_token_pixels_are_the_pixels_under_the_token():
    pixels = torch.rand(1, 3, 64, 64)
    finest = train_encoder.token_pixels(pixels, 16)
    torch.testing.assert_close(finest[0, 17], pixels[0, :, 4:8, 4:8].flatten())
    whole = train_encoder.token_pixels(pixels, 1)
    assert whole.shape == (1, 1, 3 * 8 * 8)
    torch.testing.assert_close(whole[0, 0, 0], pixels[0, 0, :8, :8].mean())


def test_captions_name_the_picture_and_tokenise_to_their_end(data):
    texts = EmojiPictures(load_emoji(data)["train"]).texts
    _, tokenizer = tiny_task(texts)
    assert all("red" in train_encoder.caption(texts[0]) for _ in range(20))
    untagged = texts[0] | {"tags": []}
    assert all("red thing" in train_encoder.caption(untagged) for _ in range(20))
    assert train_encoder.scene_caption(texts[0], texts[2], True) == "red thing to the left of green thing, round"
    ids = train_encoder.tokenize(tokenizer, ["a", "a much longer caption " * 40])["input_ids"]
    assert ids.shape[1] == tokenizer.model_max_length
    assert (ids == tokenizer.eos_token_id).any(dim=1).all()


def test_a_group_is_a_concept_in_a_style_and_draws_all_its_pictures(data):
    pictures = EmojiPictures(load_emoji(data)["train"])
    assert len(pictures) == 13 and len(pictures.group_sizes) == 12
    drawn = {row for _ in range(40) for row in pictures.draw(torch.arange(12)).tolist()}
    assert drawn == set(range(13))
    for group, row in enumerate(pictures.draw(torch.arange(12)).tolist()):
        first = pictures.texts[pictures.group_rows[pictures.group_starts[group]]]
        assert (pictures.texts[row]["base"], pictures.texts[row]["style"]) == (first["base"], first["style"])


def test_scenes_hold_both_pictures_where_their_captions_say():
    red, blue = torch.tensor([1.0, 0, 0]), torch.tensor([0, 0, 1.0])
    pixels = torch.stack([red, blue])[:, :, None, None].expand(2, 3, 64, 64)
    scenes = compose_pairs(pixels, torch.tensor([True, False]))
    is_red, is_blue = ((scenes[:, channel] > 0.9) & (scenes[:, 1] < 0.1) for channel in (0, 2))
    assert is_red[0, :, :32].any() and not is_red[0, :, 32:].any()  # red is left of blue
    assert is_blue[0, :, 32:].any() and not is_blue[0, :, :32].any()
    assert is_blue[1, :32].any() and is_red[1, 32:].any() and not is_red[1, :32].any()  # blue is above red
    assert (scenes[:, :, 0, 0] > 0.99).all()


def test_jitter_keeps_white_white_and_some_pictures_untouched():
    torch.manual_seed(0)
    white = torch.ones(4, 3, 64, 64)
    torch.testing.assert_close(jitter(white, probability=1.0), white)
    pixels = torch.rand(4, 3, 64, 64)
    assert torch.equal(jitter(pixels, probability=0.0), pixels)


def test_recolour():
    pixels = torch.rand(3, 3, 4, 4)
    plain, grey, inverted = recolour(pixels, torch.tensor([0, 1, 2]))
    assert torch.equal(plain, pixels[0])
    assert torch.equal(grey[0], grey[2])
    torch.testing.assert_close(inverted, 1 - pixels[2])


def test_psnr_matches_its_definition():
    reference = torch.zeros(1, 3, 2, 2)
    pixels = torch.tensor([0.1, 0.1, 0.3, 0.3]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert psnr(pixels, reference).item() == pytest.approx(-10 * np.log10((0.01 + 0.09) / 2), abs=1e-4)
    mask = torch.tensor([True, True, False, False]).view(1, 1, 2, 2)
    assert psnr_where(pixels, reference, mask).item() == pytest.approx(20.0, abs=1e-4)


def test_presets_give_way_to_the_command_line(tmp_path):
    presets = {"cpu": {"max_steps": 7, "learning_rate": 0.5}, "gpu": {"max_steps": 9}}
    out = str(tmp_path / "part")
    stage, training = parse_arguments("vae", presets, ["--out", out, "--learning_rate", "0.25"])
    assert (training.max_steps, training.learning_rate, training.output_dir) == (7, 0.25, f"{out}.checkpoints")
    stage, training = parse_arguments("vae", presets, ["--preset", "gpu"])
    assert (training.max_steps, stage.out) == (9, "runs/emoji/vae")
    with pytest.raises(ValueError, match="--preset is 'tpu'; it must be one of"):
        parse_arguments("vae", presets, ["--preset", "tpu"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in bfloat16")
@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_bfloat16_is_the_default_where_the_cpu_has_it(monkeypatch, has_bfloat16):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bw": True, "avx512_bf16": has_bfloat16})
    assert parse_arguments("vae", {"cpu": {}}, [])[1].bf16 == has_bfloat16
    assert not parse_arguments("vae", {"cpu": {}}, ["--bf16", "False"])[1].bf16
