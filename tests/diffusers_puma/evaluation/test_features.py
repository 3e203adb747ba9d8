"""Where quality is lost, on a tiny pipeline: every number again by a plain computation."""

import json

import pytest
import torch

from diffusers_puma.evaluation import Drawer, FeatureErrors, Samples, evaluate, lpips_distance, psnr
from diffusers_puma.evaluation.pictures import as_square, to_tensor
from transformers_puma.evaluation.runner import sample_seed

PROMPTS = ["a cat", "rain", "a dog"]


def test_errors_are_in_units_of_the_variance(full_pipeline, pictures, lpips, tmp_path):
    pipe, drawer = full_pipeline, Drawer(full_pipeline, [2, 4], seeds=[0], size=32)
    samples = Samples(
        [0, 1, 2], lambda index: {"prompt": PROMPTS[index], "image": pictures[index]}, {"data": "captions"}
    )
    file = evaluate(FeatureErrors(drawer, tmp_path, lpips), samples, tmp_path, model="tiny", batch_size=2)
    scores = json.loads(file.read_text())["scores"]
    assert scores.keys() == {"vae", "2", "4"}

    truth, free = pipe.encode_image(pictures), pipe.generate_image_features(PROMPTS, None, 2)
    for scale in (2, 4):
        deviation = truth[scale] - truth[scale].mean((0, 1))
        expected = (free[scale] - truth[scale]).square().mean() / deviation.square().mean()
        assert scores[str(scale)]["nmse_free"]["mean"] == pytest.approx(expected.item(), rel=1e-3)
    # The coarsest feature is predicted from the caption alone, whether or not the truth is shown.
    assert scores["4"]["nmse_drift"]["mean"] == pytest.approx(0, abs=1e-6)
    assert scores["4"]["psnr_forced"]["mean"] == pytest.approx(scores["4"]["psnr_free"]["mean"], abs=1e-2)
    assert scores["2"]["nmse_drift"]["mean"] > 0

    levels = [scores["vae"]["psnr"], *(scores["2"][f"psnr_{name}"] for name in ("truth", "forced", "free"))]
    for index, name in enumerate(("lost_coding", "lost_prediction", "lost_drift")):
        difference = levels[index]["mean"] - levels[index + 1]["mean"]
        assert scores["2"][name]["mean"] == pytest.approx(difference, abs=1e-6)

    original = to_tensor([as_square(picture, 32) for picture in pictures])
    for name, features in (("truth", truth), ("free", free)):
        generators = [torch.Generator().manual_seed(sample_seed(0, index)) for index in range(3)]
        drawn = pipe(image_features=features, scale=2, generator=generators).images
        if name == "truth":
            redrawn = pipe.encode_image([as_square(picture, 32) for picture in drawn])[2]
            deviation = truth[2] - truth[2].mean((0, 1))
            expected = (redrawn - truth[2]).square().mean() / deviation.square().mean()
            assert scores["2"]["nmse_decoder"]["mean"] == pytest.approx(expected.item(), rel=2e-2)
        drawn = to_tensor([as_square(picture, 32) for picture in drawn])
        decibel, distance = psnr(original, drawn).mean(), lpips_distance(lpips, original, drawn).mean()
        assert scores["2"][f"psnr_{name}"]["mean"] == pytest.approx(decibel.item(), abs=2e-2)
        assert scores["2"][f"lpips_{name}"]["mean"] == pytest.approx(distance.item(), abs=2e-2)


def test_one_picture_has_no_variance(full_pipeline, pictures, lpips, tmp_path):
    evaluation = FeatureErrors(Drawer(full_pipeline, [4], seeds=[0], size=32), tmp_path, lpips)
    scores = evaluation.scores(evaluation([{"id": 0, "prompt": "a", "image": pictures[0]}]))
    assert "psnr_free" in scores["4"] and not any("mse" in name for name in scores["4"])


def test_the_vae_alone(full_pipeline, pictures, lpips, tmp_path):
    drawer = Drawer(full_pipeline, [4], seeds=[0], size=32)
    row = FeatureErrors(drawer, tmp_path, lpips)([{"id": 0, "prompt": "a", "image": pictures[0]}])[0]
    pixels = 2 * to_tensor([as_square(pictures[0], 16)]) - 1
    with torch.no_grad():
        decoded = full_pipeline.vae.decode(full_pipeline.vae.encode(pixels).latent_dist.mode()).sample
    drawn = full_pipeline.image_processor.postprocess(decoded, "pil")[0]
    expected = psnr(to_tensor([as_square(pictures[0], 32)]), to_tensor([as_square(drawn, 32)])).item()
    assert row["scores"]["vae"]["psnr"] == pytest.approx(expected, abs=1e-3)


def test_edits_are_measured_against_their_target(full_pipeline, pictures, lpips, tmp_path):
    drawer = Drawer(full_pipeline, [3], seeds=[0], size=32)
    sample = {"id": "x", "prompt": "turn it", "image": pictures[0], "target": pictures[1]}
    (row,) = FeatureErrors(drawer, tmp_path, lpips)([sample])
    truth = full_pipeline.encode_image([pictures[1]])[3]
    free = full_pipeline.generate_image_features(["turn it"], [[pictures[0]]], 3)[3]
    assert row["scores"]["3"]["mse_free"] == pytest.approx((free - truth).square().mean().item(), rel=1e-3)
    assert row["scores"]["3"]["power"] == pytest.approx(truth.square().mean().item(), rel=1e-4)
