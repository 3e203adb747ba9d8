"""A style through LoRA, at a few steps on drawn pictures and a tiny model."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from PIL import ImageDraw

from diffusers_puma import PumaPipeline
from tests.test_hub_round_trip import build_pipeline

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import lora_style  # noqa: E402


def disc(colour: str) -> PILImage.Image:
    picture = PILImage.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).ellipse((16, 16, 48, 48), fill=colour)
    return picture


def test_a_cyanotype_is_white_on_blue():
    drawn = lora_style.cyanotype(disc("black"))
    assert drawn.size == (64, 64)
    assert drawn.getpixel((0, 0)) == (15, 51, 128) and drawn.getpixel((32, 32)) == (255, 255, 255)
    grey, yellow = (lora_style.cyanotype(disc(colour)).getpixel((32, 32)) for colour in ("silver", "yellow"))
    assert drawn.getpixel((0, 0)) < grey < yellow < (255, 255, 255)
    assert lora_style.distance([drawn], [disc("black")]) == 0


def test_an_adapter_is_trained_saved_and_shown(tmp_path):
    pipe = build_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    features = Features({"image": Image()})
    splits = {"train": ["red", "green", "blue", "black"], "heldout_concept": ["orange", "brown"]}
    rows = {name: Dataset.from_dict({"image": list(map(disc, c))}, features=features) for name, c in splits.items()}
    DatasetDict(rows).save_to_disk(str(tmp_path / "data"))
    out = tmp_path / "out"
    options = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--out", str(out)]
    lora_style.main([*options, "--scale", "1", "--steps", "3", "--batch_size", "2", "--rank", "2"])

    results = json.loads((out / "results.json").read_text())
    assert results["steps"] == 3 and results["adapter_bytes"] == (out / lora_style.WEIGHTS).stat().st_size
    assert results["distance_after"] != results["distance_before"]
    assert PILImage.open(out / "before_after.png").width > 2 * 128

    adapted = PumaPipeline.from_pretrained(tmp_path / "model")
    adapted.load_lora_weights(out, scale=1, adapter_name="style")
    request = {"image": disc("red"), "scale": 1, "output_type": "pt", "num_inference_steps": 2}
    styled = adapted(**request, generator=torch.Generator().manual_seed(0)).images
    adapted.disable_lora()
    plain = adapted(**request, generator=torch.Generator().manual_seed(0)).images
    torch.testing.assert_close(plain, pipe(**request, generator=torch.Generator().manual_seed(0)).images)
    assert not torch.equal(styled, plain)
