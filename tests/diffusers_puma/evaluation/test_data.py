"""Readers on small files in exactly the formats that are published."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from diffusers_puma.evaluation import data as module
from diffusers_puma.evaluation import open_captions, open_edits, open_pictures
from diffusers_puma.evaluation.data import fixed_order


def plain(shade: int) -> Image.Image:
    return Image.new("RGB", (6, 4), (shade, 0, 0))


def shades(samples, column: str = "image") -> list[int]:
    return [sample[column].getpixel((0, 0))[0] for sample in samples]


def test_imagenet_as_a_folder(tmp_path):
    for index, wnid in enumerate(["n01440764", "n01443537", "n01440764"]):
        file = tmp_path / wnid / f"ILSVRC2012_val_{index:08d}.JPEG"
        file.parent.mkdir(exist_ok=True)
        plain(0).convert("CMYK").save(file, "JPEG")
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n")
    samples = open_pictures(tmp_path)
    assert len(samples) == 3 and samples.source["available"] == 3
    assert sorted(samples.ids)[0] == "n01440764/ILSVRC2012_val_00000000.JPEG"
    assert samples[0]["image"].mode == "RGB" and samples[0]["id"] == samples.ids[0]


def test_imagenet_as_parquet(tmp_path):
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    (tmp_path / "data").mkdir()
    for part in range(2):
        rows = {"image": [plain(2 * part), plain(2 * part + 1)], "label": [0, 1]}
        table = Dataset.from_dict(rows, features)
        table.to_parquet(tmp_path / "data" / f"validation-{part:05d}-of-00002.parquet")
    Dataset.from_dict({"image": [plain(9)], "label": [0]}, features).to_parquet(
        tmp_path / "data" / "test-00000-of-00001.parquet"
    )
    with pytest.raises(ValueError, match="has the splits test, validation: choose one as `split`, got None"):
        open_pictures(tmp_path)
    samples = open_pictures(tmp_path, "validation")
    assert shades(samples) == samples.ids == fixed_order([0, 1, 2, 3])
    assert shades(open_pictures(tmp_path / "data" / "test-00000-of-00001.parquet")) == [9]


def test_parquet_as_the_hub_converts_it(tmp_path):
    for shade, split in enumerate(("train", "validation")):
        (tmp_path / "default" / split).mkdir(parents=True)
        table = Dataset.from_dict({"image": [plain(shade)]}, Features({"image": ImageFeature()}))
        table.to_parquet(tmp_path / "default" / split / "0000.parquet")
    with pytest.raises(ValueError, match="has the splits train, validation: choose one"):
        open_pictures(tmp_path)
    assert shades(open_pictures(tmp_path, "validation")) == [1]


def test_what_has_no_splits_or_no_template(tmp_path):
    plain(1).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="is a folder of pictures, which has no splits, got split='val'"):
        open_pictures(tmp_path, "val")
    Dataset.from_dict({"caption": ["a"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="is one saved data set, not several splits, got split='val'"):
        open_captions(tmp_path / "saved", "val")
    (tmp_path / "captions_val2014.json").write_text("{}")
    for given in ({"split": "val"}, {"template": "{x}"}):
        (name,) = given
        with pytest.raises(ValueError, match=f"is taken as COCO 2014 has it, got {name}="):
            open_captions(tmp_path, **given)


def test_other_samples_have_another_source(tmp_path):
    sources = []
    for captions in (["a", "b"], ["a", "c"], ["a", "b"]):
        Dataset.from_dict({"caption": captions}).to_parquet(tmp_path / "test.parquet")
        sources.append(open_captions(tmp_path / "test.parquet").source)
    assert sources[0] == sources[2] != sources[1]


def test_saved_data_sets(tmp_path):
    table = Dataset.from_dict({"image": [plain(1), plain(2)], "name": ["a", "b"], "style": ["x", "y"]}).cast_column(
        "image", ImageFeature()
    )
    DatasetDict({"heldout": table}).save_to_disk(tmp_path / "dict")
    table.save_to_disk(tmp_path / "one")
    for folder, split in (("dict", None), ("dict", "heldout"), ("one", None)):
        assert sorted(shades(open_pictures(tmp_path / folder, split))) == [1, 2]
    with pytest.raises(ValueError, match="has the splits heldout: choose one as `split`, got train"):
        open_pictures(tmp_path / "dict", "train")

    samples = open_captions(tmp_path / "one", template="{name} in {style} style")
    assert {sample["prompt"] for sample in samples} == {"a in x style", "b in y style"}
    assert samples.source["template"] == "{name} in {style} style" and sorted(shades(samples)) == [1, 2]
    with pytest.raises(ValueError, match="has no column caption or prompt or text or captions, only image, name"):
        open_captions(tmp_path / "one")
    with pytest.raises(ValueError, match="has no column colour"):
        open_captions(tmp_path / "one", template="{colour} {name}")


def write_coco(folder: Path) -> None:
    """Three pictures; the first has two captions, that of the lower id in second place."""
    images = [
        {
            "license": 3,
            "file_name": f"COCO_val2014_{index:012d}.jpg",
            "coco_url": f"http://images.cocodataset.org/val2014/COCO_val2014_{index:012d}.jpg",
            "height": 4,
            "width": 6,
            "date_captured": "2013-11-14 11:18:45",
            "flickr_url": "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg",
            "id": index,
        }
        for index in (391895, 522418, 184613)
    ]
    captions = [
        (391895, 770337, "Second. "),
        (391895, 37, "A man.\n"),
        (522418, 681330, "A woman."),
        (184613, 5, "A."),
    ]
    annotations = [{"image_id": image, "id": i, "caption": caption} for image, i, caption in captions]
    content = {"info": {}, "images": images, "licenses": [], "annotations": annotations}
    (folder / "annotations").mkdir()
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps(content))
    (folder / "val2014").mkdir()
    for image in images:
        plain(image["id"] % 200).save(folder / "val2014" / image["file_name"], quality=100)


def test_coco_captions(tmp_path, monkeypatch):
    write_coco(tmp_path)
    samples = open_captions(tmp_path)
    assert samples.ids == fixed_order([391895, 522418, 184613])
    prompts = {sample["id"]: sample["prompt"] for sample in samples}
    assert prompts == {391895: "A man.", 522418: "A woman.", 184613: "A."}
    assert samples[0]["image"].size == (6, 4)
    monkeypatch.setattr(module, "COCO_SUBSET", 2)
    assert open_captions(tmp_path).ids == samples.ids[:2] == samples.first(2).ids
    (tmp_path / "val2014" / f"COCO_val2014_{samples.ids[0]:012d}.jpg").unlink()
    with pytest.raises(ValueError, match="no such picture"):
        samples[0]
    with pytest.raises(ValueError, match=r"neither captions_val2014.json \(of COCO 2014\) nor a data set"):
        open_captions(tmp_path / "val2014")


def test_the_emu_edit_test_set(tmp_path):
    rows = {
        "instruction": ["Add a statue", "Remove the dog"],
        "image": [plain(1), plain(2)],
        "task": ["add", "remove"],
        "split": ["test", "test"],
        "idx": [0, 1],
        "hash": ["d41d", "8cd9"],
        "input_caption": ["a park", "a dog in a park"],
        "output_caption": ["a park with a statue", "a park"],
    }
    table = Dataset.from_dict(rows).cast_column("image", ImageFeature())
    (tmp_path / "data").mkdir()
    table.to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    samples = sorted(open_edits(tmp_path, "test"), key=lambda sample: sample["id"])
    assert [sample.keys() for sample in samples] == [{"id", "image", "prompt", "caption"}] * 2
    assert samples[1]["prompt"] == "Remove the dog" and samples[1]["caption"] == "a park"
    assert shades(samples) == [1, 2]


def test_edits_with_their_target(tmp_path):
    rows = {"image": [plain(1)], "prompt": ["make it red"], "target": [plain(7)], "type": ["style"]}
    Dataset.from_dict(rows).cast_column("image", ImageFeature()).cast_column("target", ImageFeature()).save_to_disk(
        tmp_path / "edits"
    )
    (sample,) = open_edits(tmp_path / "edits")
    assert sample["prompt"] == "make it red" and shades([sample], "target") == [7] and "caption" not in sample
    with pytest.raises(ValueError, match="no data set of edits"):
        open_edits(tmp_path)


def test_pictures_as_paths_or_bytes(tmp_path):
    files = [tmp_path / f"{shade}.png" for shade in (1, 2)]
    for file in files:
        plain(int(file.stem)).save(file)
    columns = {
        "paths": list(map(str, files)),
        "bytes": [file.read_bytes() for file in files],
        "dicts": [{"bytes": file.read_bytes(), "path": None} for file in files],
    }
    for name, values in columns.items():
        Dataset.from_dict({"image": values, "caption": ["a", "b"]}).save_to_disk(tmp_path / name)
        assert sorted(shades(open_pictures(tmp_path / name))) == [1, 2]
        assert {sample["prompt"]: sample["image"].size for sample in open_captions(tmp_path / name)}["b"] == (6, 4)


@pytest.mark.parametrize(
    ("images", "text"),
    [
        ([1, 2], r"column image of .*set must hold pictures or paths to them, not Value\('int64'\)"),
        ([None, "/no/such.png"], "cannot read the picture in column image of .*set, row 0: there is none"),
        (["/no/such.png"], "row 0: .*'/no/such.png'"),
        ([b"no picture"], "row 0: cannot identify image file"),
    ],
)
def test_columns_without_pictures(tmp_path, images, text):
    Dataset.from_dict({"image": images, "caption": ["a"] * len(images)}).save_to_disk(tmp_path / "set")
    for open_samples in (open_pictures, open_captions):
        with pytest.raises(ValueError, match=text):
            sorted(open_samples(tmp_path / "set"), key=lambda sample: sample["id"])


@pytest.mark.parametrize("absent", [None, "", " ", []])
def test_texts_that_are_missing(tmp_path, absent):
    given = ["a"] if absent == [] else "a"
    rows = {"image": [plain(1)] * 2, "prompt": [given, absent], "output_caption": ["b", "c"], "style": ["x", None]}
    table = Dataset.from_dict(rows).cast_column("image", ImageFeature())
    table.save_to_disk(tmp_path / "set")
    for open_samples in (open_captions, open_edits):
        with pytest.raises(ValueError, match="must have a text in column prompt of every row, row 1 has "):
            open_samples(tmp_path / "set")
    with pytest.raises(ValueError, match="must have all of style in every row, row 1 has {'style': None}"):
        open_captions(tmp_path / "set", template="in {style} style")
    with pytest.raises(ValueError, match="a template names columns, such as {image}, got 'a cat'"):
        open_captions(tmp_path / "set", template="a cat")
    table.rename_columns({"prompt": "output_caption", "output_caption": "prompt"}).save_to_disk(tmp_path / "swapped")
    with pytest.raises(ValueError, match="must have a text in column output_caption of every row"):
        open_edits(tmp_path / "swapped")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "captions_val2014.json is not valid JSON"),
        ("[]", "must hold images with id and file_name, and annotations of them with id, image_id and caption"),
        ('{"images": []}', "must hold images .*: KeyError"),
        ('{"images": [], "annotations": [{"id": 1, "image_id": 2, "caption": "a"}]}', "must hold images .*: KeyError"),
        ('{"images": [], "annotations": [5]}', "must hold images .*: TypeError"),
        (
            '{"images": [{"id": 2, "file_name": "a"}], "annotations": [{"id": 1, "image_id": 2, "caption": null}]}',
            "captions_val2014.json has an empty caption of image 2",
        ),
    ],
)
def test_other_captions_than_coco_publishes(tmp_path, content, text):
    (tmp_path / "captions_val2014.json").write_text(content)
    with pytest.raises(ValueError, match=text):
        open_captions(tmp_path)


def test_the_order_is_fixed():
    """Pinned, so that a subset stays the same in every version."""
    assert fixed_order(list(range(6))) == [4, 3, 0, 1, 2, 5]


def test_damaged_pictures_are_named(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot read the picture .*a.png"):
        open_pictures(tmp_path)[0]


def test_hidden_files_are_no_pictures(tmp_path):
    """What macOS puts beside each on a foreign disk has its name and suffix."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"no picture")
    assert open_pictures(tmp_path).ids == ["a.png"]
