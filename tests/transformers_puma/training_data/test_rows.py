"""Filters, crops, boxes and prompts of each stage."""

import random

import cv2
import numpy as np
import pytest
from PIL import Image

from transformers_puma import PumaImageProcessor
from transformers_puma.training.data import build_training_data, load_source
from transformers_puma.training.data.conditions import INSTRUCTIONS, compute_condition, mask_rectangle
from transformers_puma.training.data.rows import RowMaker
from transformers_puma.training.data.samples import make_sample, stored_image
from transformers_puma.training.data.transforms import (
    WHOLE,
    apply_crop,
    center_crop,
    crop_box,
    ground_caption,
    random_crop,
)

from .writers import encoded, img2dataset_sample, picture, write_json_lines, write_laion_tars, write_tar


def gradient(width: int, height: int) -> Image.Image:
    """Red is the column, green the row."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8))


def test_center_crop():
    cropped = np.asarray(apply_crop(gradient(40, 20), center_crop((40, 20)), None))
    assert cropped.shape == (20, 20, 3)
    assert (cropped[0, 0, 0], cropped[0, -1, 0]) == (10, 29) and (cropped[0, 0, 1], cropped[-1, 0, 1]) == (0, 19)


def test_random_crops_are_squares_inside():
    rng, sizes, corners = random.Random(0), set(), set()
    for _ in range(50):
        cropped = apply_crop(gradient(200, 100), random_crop((200, 100), rng), None)
        assert cropped.width == cropped.height and 80 <= cropped.width <= 100
        left, upper, _ = cropped.getpixel((0, 0))
        assert cropped.getpixel((cropped.width - 1,) * 2)[:2] == (left + cropped.width - 1, upper + cropped.width - 1)
        sizes.add(cropped.width)
        corners.add((left, upper))
    assert len(sizes) > 10 and len(corners) > 20


def test_resize():
    assert apply_crop(gradient(40, 20), center_crop((40, 20)), 7).size == (7, 7)
    whole = apply_crop(gradient(40, 20), WHOLE, 10)
    assert whole.size == (10, 10) and whole.getpixel((0, 5))[0] < 4 and whole.getpixel((9, 5))[0] > 35
    assert apply_crop(gradient(40, 20), WHOLE, None).size == (40, 20)


def test_boxes_follow_the_crop():
    crop = (0.25, 0.0, 0.75, 1.0)
    assert crop_box((0.25, 0.0, 0.5, 0.5), crop) == (0.0, 0.0, 0.5, 0.5)
    assert crop_box((0.0, 0.2, 1.0, 0.4), crop) == (0.0, 0.2, 1.0, 0.4)
    assert crop_box((0.0, 0.0, 0.25, 1.0), crop) is None  # it only touches the crop
    phrases = [
        {"end": 13, "box": [0.8, 0, 1, 1]},
        {"end": 5, "box": [0.25, 0, 0.5, 0.5]},
        {"end": 5, "box": [0, 0, 1, 1]},
    ]
    text, boxes = ground_caption("a cat and dog", phrases, crop, (100, 50))
    assert text == "a cat<box><box> and dog"
    assert boxes == [(0.0, 0.0, 50.0, 25.0), (0.0, 0.0, 100.0, 50.0)]


def write_sizes(folder, sizes: list[tuple[int, int]]) -> None:
    write_tar(folder / "0.tar", [img2dataset_sample(i, f"{w}x{h}", (w, h)) for i, (w, h) in enumerate(sizes)])


def test_decoder_takes_512_pixels_or_larger(tmp_path):
    write_sizes(tmp_path, [(511, 900), (512, 512), (700, 600)])
    sources = [{"name": "laion_2b", "path": str(tmp_path)}]
    rows = list(build_training_data(sources, "decoder", shuffle_buffer=0, max_broken_share=0, min_samples=1))
    assert [row["image"].size for row in rows] == [(512, 512), (600, 600)]
    assert all(row.keys() == {"image"} for row in rows)
    small = build_training_data(sources, "decoder", min_image_size=1, image_size=64)
    assert [row["image"].size for row in small] == [(64, 64)] * 3


def test_pretraining_is_half_text_to_image(tmp_path):
    write_laion_tars(tmp_path, 1, 200, size=(8, 8))
    rows = list(load_source("laion_2b", str(tmp_path), stage="pretraining"))
    to_image = [row for row in rows if row["completion"] == "<image>"]
    to_text = [row for row in rows if row["prompt"] == "<image>"]
    assert len(to_image) + len(to_text) == len(rows) == 200
    assert len(to_image) == pytest.approx(100, abs=25)
    assert all(row["completion"].startswith("caption") for row in to_text)


def test_source_and_target_have_the_same_crop(tmp_path):
    """The target is twice as large; a third one, of another shape, is no pair with the source."""
    images = tmp_path / "images"
    images.mkdir()
    gradient(100, 80).save(images / "source.png")
    gradient(100, 80).resize((200, 160), Image.Resampling.NEAREST).save(images / "target.png")
    gradient(80, 100).save(images / "other.png")
    records = [{"source_image": "source.png", "target_image": "target.png", "instruction": f"{i}"} for i in range(10)]
    records.append(records[0] | {"target_image": "other.png"})
    write_json_lines(tmp_path / "annotations/split_0001.jsonl", records)
    rows = list(load_source("seed_data_edit", str(tmp_path), image_size=32, max_broken_share=0))
    assert len(rows) == 10
    for row in rows:
        source, target = (np.asarray(image, dtype=int) for image in row["images"])
        assert np.abs(source - target).max() <= 2
    assert len({row["images"][0].tobytes() for row in rows}) == 10


def test_conditional_prompts(tmp_path):
    """Half of the prompts name the task, and a plain picture is used for all three."""
    write_laion_tars(tmp_path, 1, 150, size=(16, 16))
    rows = list(load_source("laion_aesthetics", str(tmp_path), stage="conditional", image_size=16))
    prompts = [row["prompt"].removeprefix("<image>") for row in rows]
    bare = [prompt for prompt in prompts if prompt.startswith("caption")]
    assert len(bare) == pytest.approx(75, abs=20)
    for instruction in INSTRUCTIONS.values():
        assert sum(prompt.startswith(f"{instruction} caption") for prompt in prompts) == pytest.approx(25, abs=12)
    assert all(row["completion"] == "<image>" and len(row["images"]) == 2 for row in rows)


def test_computed_conditions():
    image = picture(32, 24, seed=5)
    edges = np.asarray(compute_condition(image, "canny", random.Random(0)))
    assert set(np.unique(edges)) <= {0, 255}
    assert (edges[..., 0] == cv2.Canny(np.asarray(image), 100, 200)).all()
    grey = np.asarray(compute_condition(image, "colorization", random.Random(0)), dtype=int)
    assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 1] == grey[..., 2]).all()
    luma = np.asarray(image) @ [0.299, 0.587, 0.114]
    assert np.abs(grey[..., 0] - luma).max() <= 1


def test_mask_is_a_rectangle():
    white = Image.new("RGB", (40, 20), "white")
    boxes = set()
    for seed in range(20):
        masked = np.asarray(mask_rectangle(white, random.Random(seed)))[..., 0]
        rows, columns = np.nonzero(masked == 0)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) == height * width
        assert 5 <= height <= 15 and 10 <= width <= 30
        boxes.add((rows.min(), columns.min(), height, width))
    assert len(boxes) > 15


def test_understanding_resizes_the_whole_picture(tmp_path):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]
    gradient(60, 20).save(tmp_path / "a.png")
    write_json_lines(tmp_path / "chat.jsonl", [{"image": "a.png", "conversations": turns}])
    (row,) = load_source("llavar", str(tmp_path / "chat.jsonl"), images=str(tmp_path), image_size=20)
    assert row["images"][0].size == (20, 20) and row["images"][0].getpixel((19, 0))[0] > 55
    assert row["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]


def test_markup_in_captions_is_removed(tmp_path):
    write_tar(tmp_path / "0.tar", [img2dataset_sample(0, "a <image> of <box>es")])
    (row,) = load_source("laion_2b", str(tmp_path), stage="text_to_image")
    assert row["prompt"] == "a  of es"


def test_a_resized_picture_is_what_the_encoder_sees_of_the_picture_itself():
    processor, picture = PumaImageProcessor(size={"height": 16, "width": 16}), gradient(40, 30)
    direct, resized = (
        processor(image, return_tensors="np")["pixel_values"] for image in (picture, apply_crop(picture, WHOLE, 16))
    )
    np.testing.assert_array_equal(resized, direct)


@pytest.mark.parametrize(
    ("stage", "varied"), [("text_to_image", True), ("pretraining", False), ("conditional", False)]
)
def test_crops_of_each_stage(tmp_path, stage, varied):
    """Random ones in the tuning of text to image, the middle square elsewhere."""
    write_tar(tmp_path / "0.tar", [img2dataset_sample(i, f"{i}", (60, 40)) for i in range(6)])
    rows = list(load_source("laion_2b", str(tmp_path), stage=stage))
    sizes = {row["images"][-1].size for row in rows}
    assert len(rows) == 6 and (len(sizes) > 2 if varied else sizes == {(40, 40)})


@pytest.mark.parametrize(("stage", "other"), [("pretraining", "<image>"), ("conditional", "<image>c")])
def test_draws_are_fair(stage, other):
    """Image to text, and prompts without the task: half of 2000, give or take four deviations."""
    image = [stored_image(encoded(picture(8, 8), "PNG"), "png")]
    make = RowMaker(stage, kinds={"s": "pair"}, counters={}, seed=0, image_size=None, min_image_size=1)
    samples = (make_sample(str(i), {"caption": "c"}, image) | {"source": "s"} for i in range(2000))
    share = sum(row["prompt"] == other for sample in samples for row in make.make_rows(sample)) / 2000
    assert share == pytest.approx(0.5, abs=4 * (0.25 / 2000) ** 0.5)
