"""Tables 2, 3 and 6 on a tiny pipeline: every score again from the pictures, and the best of all scales."""

import json

import pytest
import torch
from PIL import Image, ImageOps

from diffusers_puma.evaluation import (
    AlexNetEncoder,
    Drawer,
    Editing,
    Generation,
    Samples,
    evaluate,
    frechet_distance,
    load_clip,
    lpips_distance,
    psnr,
)
from diffusers_puma.evaluation.encoders import DinoEncoder
from diffusers_puma.evaluation.pictures import as_square, to_tensor
from transformers_puma.evaluation.runner import sample_seed

PROMPTS = ["a cat", "a dog on a lawn", "rain"]


@pytest.fixture
def drawer(full_pipeline) -> Drawer:
    return Drawer(full_pipeline, [2, 4], seeds=[0, 1], size=32)


@pytest.fixture
def samples(pictures) -> Samples:
    def read(index: int) -> dict:
        return {"prompt": PROMPTS[index], "image": pictures[index]}

    return Samples([0, 1, 2], read, {"data": "captions"})


def draw(drawer: Drawer, sample: dict, scale: int, seed: int, **inputs) -> Image.Image:
    generator = torch.Generator().manual_seed(sample_seed(seed, sample["id"]))
    image = drawer.pipe(sample["prompt"], scale=scale, generator=generator, **inputs).images[0]
    return as_square(image, 32)


def lpips_of(lpips, first: Image.Image, second: Image.Image) -> float:
    return lpips_distance(lpips, to_tensor([as_square(first, 32)]), to_tensor([second])).item()


def test_generation(drawer, samples, lpips, clip_name, tmp_path):
    clip, alexnet = load_clip(clip_name), AlexNetEncoder(lpips)
    file = evaluate(Generation(drawer, tmp_path, clip, lpips, alexnet), samples, tmp_path, model="tiny", batch_size=2)
    results = json.loads(file.read_text())
    assert results["settings"]["clip"] == clip_name and results["settings"]["frechet"] == "frechet_alexnet"

    each = {}
    for scale in (2, 4):
        pictures = [[draw(drawer, sample, scale, seed) for seed in (0, 1)] for sample in samples]
        vectors, words = clip.pictures([pair[0] for pair in pictures]), clip.texts(PROMPTS)
        truth = [sample["image"] for sample in samples]
        each[scale] = {
            "clip_t": (vectors * words).sum(-1).tolist(),
            "clip_i": (vectors * clip.pictures(truth)).sum(-1).tolist(),
            "lpips_t": [lpips_of(lpips, true, pair[0]) for true, pair in zip(truth, pictures, strict=True)],
            "lpips_d": [lpips_of(lpips, *pair) for pair in pictures],
        }
        scores = results["scores"][str(scale)]
        for name, values in each[scale].items():
            assert scores[name]["mean"] == pytest.approx(sum(values) / 3, abs=3e-3), name
        squares = [ImageOps.fit(true, (32, 32), Image.Resampling.BICUBIC) for true in truth]
        distance = frechet_distance(alexnet.pictures(squares), alexnet.pictures([pair[0] for pair in pictures]))
        assert scores["frechet_alexnet"] == {"mean": pytest.approx(distance, rel=1e-2)}

    best = results["scores"]["max"]
    assert best.keys() == {"clip_i", "clip_t", "lpips_t"}
    for name, choose in (("clip_i", max), ("clip_t", max), ("lpips_t", min)):
        values = [choose(pair) for pair in zip(each[2][name], each[4][name], strict=True)]
        assert best[name]["mean"] == pytest.approx(sum(values) / 3, abs=3e-3)


def test_captions_without_pictures(drawer, lpips, clip_name, tmp_path):
    samples = Samples(["a"], lambda name: {"prompt": "a cat"}, {"data": "captions"})
    evaluation = Generation(drawer, tmp_path, load_clip(clip_name), lpips)
    row = evaluation([samples[0]])[0]
    assert row["scores"]["2"].keys() == {"clip_t", "lpips_d"} and "features" not in row
    assert evaluation.scores([row])["max"].keys() == {"clip_t"}


def test_networks_that_find_nothing_to_compare(full_pipeline, lpips, tmp_path):
    drawn = []
    handle = full_pipeline.unet_4.register_forward_pre_hook(lambda *inputs: drawn.append(inputs))
    sample, one_seed = {"id": 0, "prompt": "a cat"}, Drawer(full_pipeline, [4], seeds=[0], size=32)
    with pytest.raises(ValueError, match="frechet needs true pictures, and these samples have prompts alone"):
        Generation(one_seed, tmp_path, frechet=AlexNetEncoder(lpips))([sample])
    with pytest.raises(ValueError, match="lpips needs true pictures or several seeds"):
        Generation(one_seed, tmp_path, lpips=lpips)([sample])
    handle.remove()
    assert not drawn


def test_nothing_to_measure(drawer, tmp_path):
    with pytest.raises(ValueError, match="nothing to measure"):
        Generation(drawer, tmp_path)
    with pytest.raises(ValueError, match="nothing to measure"):
        Editing(drawer)


def test_an_edit_is_drawn_once(drawer, clip_name):
    with pytest.raises(ValueError, match=r"draws each sample once, got seeds \[0, 1\]"):
        Editing(drawer, load_clip(clip_name))


def test_editing(full_pipeline, pictures, lpips, clip_name):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
    )
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    dino = DinoEncoder("tiny", ViTModel(config, add_pooling_layer=False), processor)
    drawer, clip = Drawer(full_pipeline, [2, 3], seeds=[7], size=32), load_clip(clip_name)
    samples = [
        {"id": index, "image": pictures[index], "prompt": "turn it", "caption": PROMPTS[index], "target": pictures[2]}
        for index in range(2)
    ]
    evaluation = Editing(drawer, clip, dino, lpips)
    rows = evaluation(samples)

    edited, source = draw(drawer, samples[1], 3, 7, image=[pictures[1]]), as_square(pictures[1], 32)
    cosines = {
        "clip_i": (clip.pictures([edited]) * clip.pictures([source])).sum().item(),
        "clip_t": (clip.pictures([edited]) * clip.texts([PROMPTS[1]])).sum().item(),
        "dino": (dino.pictures([edited]) * dino.pictures([source])).sum().item(),
    }
    target = as_square(pictures[2], 32)
    distances = {
        "psnr_t": psnr(to_tensor([target]), to_tensor([edited])).item(),
        "lpips_t": lpips_of(lpips, target, edited),
        "lpips_s": lpips_of(lpips, pictures[1], edited),
    }
    assert {name: rows[1]["scores"]["3"][name] for name in cosines} == pytest.approx(cosines, abs=1e-4)
    assert rows[1]["scores"]["3"] == pytest.approx({**cosines, **distances}, abs=5e-3)
    unchanged = rows[1]["scores"]["unchanged"]
    assert unchanged["clip_i"] == pytest.approx(1, abs=1e-5) and unchanged["lpips_s"] == pytest.approx(0, abs=1e-6)
    assert unchanged["psnr_t"] == pytest.approx(psnr(to_tensor([target]), to_tensor([source])).item(), abs=1e-3)
    assert unchanged["lpips_t"] == pytest.approx(lpips_of(lpips, target, source), abs=1e-4)
    assert evaluation.scores(rows)["unchanged"]["lpips_s"]["mean"] == pytest.approx(0, abs=1e-6)
    best = evaluation.scores(rows)["max"]
    assert best["psnr_t"]["mean"] == pytest.approx(
        sum(max(row["scores"][scale]["psnr_t"] for scale in "23") for row in rows) / 2
    )

    without = [{name: sample[name] for name in ("id", "image", "prompt")} for sample in samples]
    assert evaluation(without)[0]["scores"]["2"].keys() == {"clip_i", "dino", "lpips_s"}
