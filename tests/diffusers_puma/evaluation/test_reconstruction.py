"""Table 1 on a tiny pipeline: hand-computed distances, and the same numbers in any batch."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio

from diffusers_puma.evaluation import Drawer, Reconstruction, Samples, evaluate, lpips_distance, psnr
from diffusers_puma.evaluation.pictures import as_square, to_tensor
from transformers_puma.evaluation.runner import sample_seed
from transformers_puma.pictures import as_rgb


def samples_of(pictures: list[Image.Image]) -> Samples:
    return Samples(list(range(len(pictures))), lambda index: {"image": pictures[index]}, {"data": "pictures"})


def test_psnr_by_hand():
    black = torch.zeros(3, 3, 8, 8)
    other = black.clone()
    other[0] += 0.1  # squared error 0.01
    other[1, 0, 0, 0] = 1  # 1 / 192
    torch.testing.assert_close(psnr(black, other), torch.tensor([20.0, 22.8330, 100.0]), rtol=0, atol=1e-3)


def test_psnr_is_that_of_torchmetrics():
    first, second = torch.rand(2, 4, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    expected = peak_signal_noise_ratio(first, second, data_range=1.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr(first, second), expected, atol=1e-4, rtol=0)


def test_pictures_become_upright_rgb_on_white_and_square():
    picture = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    picture.getexif()[0x0112] = 6
    assert as_rgb(picture).size == (2, 4) and as_rgb(picture).getpixel((0, 0)) == (255, 255, 255)
    assert as_rgb(Image.new("L", (3, 3), 7)).getpixel((1, 1)) == (7, 7, 7)
    assert as_square(Image.new("RGB", (30, 10)), 16).size == (16, 16)


@pytest.mark.parametrize(("mode", "order"), [("I;16", "<"), ("I;16B", ">")])
def test_grey_of_16_bits_becomes_8_bits(mode, order):
    data = np.array([0, 257, 7 * 257 + 128, 7 * 257 + 129, 65535], dtype=f"{order}u2").tobytes()
    picture = as_rgb(Image.frombytes(mode, (5, 1), data))
    assert np.array(picture).tolist() == [[[value] * 3 for value in (0, 1, 7, 8, 255)]]


def test_a_pgm_of_16_bits_becomes_8_bits():
    levels = np.array([0, 16384, 32768, 65535], dtype=">u2").tobytes()
    assert np.array(as_rgb(Image.open(io.BytesIO(b"P5 4 1 65535\n" + levels))))[0, :, 0].tolist() == [0, 64, 128, 255]


def test_scores_are_distances_of_the_pipelines_pictures(decoder_pipeline, pictures, lpips):
    evaluation = Reconstruction(Drawer(decoder_pipeline, [0, 3], seeds=[0, 1], size=32), lpips)
    row = evaluation([{"id": "cat", "image": pictures[0]}])[0]

    original = as_square(pictures[0], 32)
    drawn = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(sample_seed(seed, "cat"))
        image = decoder_pipeline(image=original, scale=3, generator=generator).images[0]
        drawn.append(to_tensor([as_square(image, 32)]))
    truth = to_tensor([original])
    expected = {
        "psnr_r": (psnr(truth, drawn[0]) + psnr(truth, drawn[1])).item() / 2,
        "psnr_d": psnr(*drawn).item(),
        "lpips_r": (lpips_distance(lpips, truth, drawn[0]) + lpips_distance(lpips, truth, drawn[1])).item() / 2,
        "lpips_d": lpips_distance(lpips, *drawn).item(),
    }
    assert row["id"] == "cat" and row["scores"].keys() == {"0", "3"}
    assert row["scores"]["3"] == pytest.approx(expected, abs=1e-2)
    assert row["scores"]["0"]["psnr_r"] != pytest.approx(expected["psnr_r"], abs=1e-2)


def test_one_seed_has_no_diversity(decoder_pipeline, pictures, lpips):
    row = Reconstruction(Drawer(decoder_pipeline, [4], seeds=[5], size=32), lpips)([{"id": 0, "image": pictures[1]}])[
        0
    ]
    assert row["scores"]["4"].keys() == {"psnr_r", "lpips_r"}


def test_batches_and_kills_change_nothing(decoder_pipeline, pictures, lpips, tmp_path):
    evaluation = Reconstruction(Drawer(decoder_pipeline, [1, 4], size=32), lpips)
    samples = samples_of([*pictures, pictures[0].rotate(180)])
    whole = tmp_path / "whole"
    assert evaluate(evaluation, samples, whole, model="tiny", batch_size=4) == whole / "results.json"

    class Killed(Reconstruction):
        calls = 0

        def __call__(self, batch):
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().__call__(batch)

    with pytest.raises(KeyboardInterrupt):
        evaluate(Killed(evaluation.drawer, lpips), samples, tmp_path / "killed", model="tiny", batch_size=1)
    assert not (tmp_path / "killed" / "results.json").exists()
    evaluate(evaluation, samples, tmp_path / "killed", model="tiny", batch_size=2)

    first, second = (json.loads((folder / "results.json").read_text()) for folder in (whole, tmp_path / "killed"))
    assert first["settings"] == second["settings"] and first["num_samples"] == 4
    for scale in ("1", "4"):
        for metric, score in first["scores"][scale].items():
            assert score == pytest.approx(second["scores"][scale][metric], abs=2e-2), (scale, metric)


def test_what_cannot_be_drawn(decoder_pipeline):
    decoder_pipeline.register_modules(unet_2=None)
    with pytest.raises(ValueError, match=r"scales \[2\] are to be drawn, and the pipeline has \[0, 1, 3, 4\]"):
        Drawer(decoder_pipeline, [2])
    with pytest.raises(ValueError, match="all different"):
        Drawer(decoder_pipeline, [1], seeds=[3, 3])


def test_sizes_and_steps_are_the_pipelines_by_default(decoder_pipeline):
    settings = Drawer(decoder_pipeline, [4, 0]).settings()
    assert settings["size"] == 16 and settings["num_inference_steps"] == 3 and settings["scales"] == [0, 4]
