"""Each source, read back from files in its own format."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset
from PIL import Image

from transformers_puma.training import PumaDataCollator
from transformers_puma.training.data import (
    CAMBRIAN_IN_ONEVISION,
    CAMBRIAN_MATH_REASONING,
    ONEVISION_MATH_REASONING,
    load_source,
)
from transformers_puma.training.data.samples import plain

from .writers import (
    encoded,
    img2dataset_sample,
    picture,
    write_json_lines,
    write_laion_tars,
    write_picture,
    write_tar,
)

QUESTION = {"from": "human", "value": "<image>\nWhat does it say?"}
ANSWER = {"from": "gpt", "value": "It says PUMA."}
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What does it say?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "It says PUMA."}]},
]


def captions(rows: list[dict]) -> list[str]:
    return [row["prompt"] for row in rows]


@pytest.mark.parametrize("name", ["laion_2b", "laion_aesthetics"])
def test_laion_tars(tmp_path, name):
    expected = write_laion_tars(tmp_path, num_tars=2, num_samples=3)
    (tmp_path / "00000.parquet").write_bytes(b"img2dataset writes the metadata beside each tar")
    rows = list(load_source(name, str(tmp_path), stage="text_to_image"))
    assert captions(rows) == expected
    assert {row["completion"] for row in rows} == {"<image>"}
    assert all(isinstance(row["images"][0], Image.Image) and row["images"][0].mode == "RGB" for row in rows)
    by_glob = load_source(name, str(tmp_path / "*1.tar"), stage="text_to_image")
    assert captions(list(by_glob)) == expected[3:]


def test_laion_caption_of_the_json(tmp_path):
    write_tar(tmp_path / "0.tar", [img2dataset_sample(0, "alt text", top_caption="a puma")])
    rows = list(load_source("laion_2b", str(tmp_path), stage="text_to_image", caption="top_caption"))
    assert captions(rows) == ["a puma"]


def test_laion_parquet(tmp_path):
    """img2dataset keeps rows whose download failed; they are left out and are not broken."""
    columns = {
        "caption": ["a puma", "not there", "a fox"],
        "url": ["https://example.com/"] * 3,
        "key": ["000000000", "000000001", "000000002"],
        "status": ["success", "failed_to_download", "success"],
        "error_message": [None, "HTTP Error 404", None],
        "jpg": [encoded(picture(seed=0)), None, encoded(picture(seed=1))],
    }
    pq.write_table(pa.table(columns), tmp_path / "00000.parquet", row_group_size=1)
    data = load_source("laion_aesthetics", str(tmp_path), stage="text_to_image", num_shards=3, max_broken_share=0)
    assert captions(list(data)) == ["a puma", "a fox"]
    assert data.num_shards == 3  # row groups


def test_journeydb(tmp_path):
    split = tmp_path / "train"
    records = [
        {"img_path": f"./000/{i}.jpg", "prompt": f"prompt {i} --ar 3:2", "Task2": {"Caption": f"A caption {i}."}}
        for i in range(3)
    ]
    records[1]["Task2"] = {}
    write_json_lines(split / "train_anno_realease_repath.jsonl", records)
    write_json_lines(split / "train_anno.jsonl", records)  # the same before the pictures were moved
    for i in range(3):
        write_picture(split / f"imgs/000/{i}.jpg", seed=i)
    rows = list(load_source("journeydb", str(split), stage="text_to_image"))
    assert captions(rows) == ["prompt 0 --ar 3:2", "prompt 1 --ar 3:2", "prompt 2 --ar 3:2"]
    rows = list(load_source("journeydb", str(split), stage="text_to_image", caption="caption", max_broken_share=0))
    assert captions(rows) == ["A caption 0.", "A caption 2."]


# The instance on the card of GRIT, its picture an eighth as large.
GRIT_CAPTION = "a wire hanger with a paper cover that reads we heart our customers"
GRIT_SPANS = {
    "noun_chunks": [
        [19, 32, 0.019644069503434333, 0.31054004033406574, 0.9622142865754519, 0.9603442351023356, 0.79298526],
        [0, 13, 0.019422357885505368, 0.027634161214033764, 0.9593302408854166, 0.969467560450236, 0.67520964],
    ],
    "ref_exps": [
        [19, 66, 0.019644069503434333, 0.31054004033406574, 0.9622142865754519, 0.9603442351023356, 0.79298526],
        [0, 66, 0.019422357885505368, 0.027634161214033764, 0.9593302408854166, 0.969467560450236, 0.67520964],
    ],
}


def test_grit(tmp_path):
    write_tar(tmp_path / "00000.tar", [img2dataset_sample(0, GRIT_CAPTION, (128, 87), **GRIT_SPANS)])
    (row,) = load_source("grit", str(tmp_path), stage="text_to_image", image_size=100)
    assert row["prompt"] == "a wire hanger<box> with a paper cover<box> that reads we heart our customers"
    (row,) = load_source("grit", str(tmp_path), stage="pretraining")
    # The centre crop is 87 x 87 pixels of 128 x 87.
    left = (128 - 87) / 2
    (x_min, y_min, x_max, y_max), _ = row["boxes"]
    assert (x_min, x_max) == (0.0, 87.0)
    assert y_min == pytest.approx(0.027634161214033764 * 87) and y_max == pytest.approx(0.969467560450236 * 87)
    assert left > 0.0194 * 128  # the box begins left of the crop, so it is cut at its edge
    (row,) = load_source("grit", str(tmp_path), stage="text_to_image", phrases="ref_exps")
    assert row["prompt"] == f"{GRIT_CAPTION}<box><box>" and len(row["boxes"]) == 2


def test_the_pile(tmp_path):
    texts = ["one\nline\u2028more", "two <image>and <box>", "three"]
    lines = "".join(
        json.dumps({"text": text, "meta": {"pile_set_name": "Pile-CC"}}, ensure_ascii=False) + "\n" for text in texts
    ).encode()
    # The files of The Pile hold several zstd frames.
    cut = lines.index(b"\n") + 1
    compressor = zstandard.ZstdCompressor()
    (tmp_path / "00.jsonl.zst").write_bytes(compressor.compress(lines[:cut]) + compressor.compress(lines[cut:]))
    # What would be markup in a row is left out.
    expected = [texts[0], "two and", texts[2]]
    assert list(load_source("the_pile", str(tmp_path))) == [{"text": text} for text in expected]


def test_ocr_vqa(tmp_path):
    entry = {
        "imageURL": "http://ecx.images-amazon.com/images/I/51l6XIoa3rL.jpg",
        "questions": ["Who wrote this book?", "What is the title of this book?"],
        "answers": ["Sandra Boynton", "Mom's Family Wall Calendar 2016"],
        "title": "Mom's Family Wall Calendar 2016",
        "authorName": "Sandra Boynton",
        "genre": "Calendars",
        "split": 1,
    }
    (tmp_path / "dataset.json").write_text(json.dumps({"761183272": entry, "1": entry | {"split": 3}}))
    write_picture(tmp_path / "images/761183272.jpg")
    (row,) = load_source("ocr_vqa", str(tmp_path), max_broken_share=0)
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * 2
    first, *others = [message["content"] for message in row["messages"]]
    assert first == [{"type": "image"}, {"type": "text", "text": "Who wrote this book?"}]
    assert [content[0]["text"] for content in others] == [
        "Sandra Boynton",
        "What is the title of this book?",
        "Mom's Family Wall Calendar 2016",
    ]
    assert len(row["images"]) == 1


@pytest.mark.parametrize("json_lines", [False, True])
def test_llavar(tmp_path, json_lines):
    entries = [
        {"id": str(i), "image": f"{i}.jpg", "conversations": [QUESTION, {"from": "gpt", "value": f"{i}."}]}
        for i in range(5)
    ]
    for i in range(5):
        write_picture(tmp_path / f"finetune/{i}.jpg", seed=i)
    file = tmp_path / ("chat.jsonl" if json_lines else "llava_instruct_150k_llavar_20k.json")
    if json_lines:
        write_json_lines(file, entries)
    else:
        file.write_text(json.dumps(entries))
    data = load_source("llavar", str(file), images=str(tmp_path / "finetune"), num_shards=2)
    rows = list(data)
    assert data.num_shards == 2
    # Two shards of one file: each has every second entry.
    assert [row["messages"][1]["content"][0]["text"] for row in rows] == ["0.", "2.", "4.", "1.", "3."]
    assert rows[0]["messages"][0] == MESSAGES[0]


def write_onevision(folder: Path, subset: str, rows: list[dict]) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turns = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    schema = pa.schema([("id", pa.string()), ("image", image), ("conversations", turns), ("data_source", pa.string())])
    (folder / subset).mkdir(parents=True)
    table = pa.Table.from_pylist([row | {"data_source": subset} for row in rows], schema)
    pq.write_table(table, folder / subset / "train-00000-of-00001.parquet")


def test_llava_onevision(tmp_path):
    image = {"bytes": encoded(picture(), "PNG"), "path": "1.png"}
    row = {"id": "1", "image": image, "conversations": [QUESTION, ANSWER]}
    write_onevision(
        tmp_path,
        "sharegpt4v(sam)",
        [row, {**row, "id": "2", "image": None, "conversations": [{"from": "human", "value": "Say PUMA."}, ANSWER]}],
    )
    write_onevision(tmp_path, "geo170k(qa)", [row])
    write_onevision(tmp_path, "vsr(cauldron,llava_format)", [row])
    rows = list(load_source("llava_onevision", str(tmp_path)))
    assert len(rows) == 3
    assert rows[0]["messages"] == MESSAGES and rows[0]["images"][0].size == (24, 16)
    assert "images" not in rows[1]
    assert len(list(load_source("llava_onevision", str(tmp_path), exclude=["sharegpt4v(sam)"]))) == 2


def test_cambrian(tmp_path):
    def entry(source: str, image: str | None, first: str = "human") -> dict:
        turns = [{"from": "system", "value": "Answer briefly."}, QUESTION | {"from": first}, ANSWER]
        return {"id": "1", "source": source, "conversations": turns} | ({"image": image} if image else {})

    write_json_lines(
        tmp_path / "Cambrian7M_withsystemprompt.jsonl",
        [
            entry("lvis_instruct4v_220k.json", "coco/train2017/1.jpg"),
            entry("geo170k.json", "geo170k/images/1.png"),
            entry("gpt77k.json", "mathvision/images/1.png"),
            entry("idefics375k.json", "hfdata/raven/1.png"),
            entry("idefics375k.json", "hfdata/vistext/1.png"),
            entry("idefics375k.json", "hfdata/tat_qa/1.png"),
            entry("chartqa_28k.json", "chartqa/1.png"),
        ],
    )
    write_picture(tmp_path / "coco/train2017/1.jpg")
    write_picture(tmp_path / "hfdata/tat_qa/1.png")
    rows = list(load_source("cambrian", str(tmp_path), images=str(tmp_path), max_broken_share=0))
    assert len(rows) == 2
    assert rows[0]["messages"] == [
        {"role": "system", "content": [{"type": "text", "text": "Answer briefly."}]},
        *MESSAGES,
    ]


def test_excluded_subsets_are_named_and_apart():
    assert {"geo170k(qa)", "mavis_math_metagen", "raven(cauldron)"} <= ONEVISION_MATH_REASONING
    assert {"geo170k.json", "mathinstruct_262k.json"} <= CAMBRIAN_MATH_REASONING
    assert not CAMBRIAN_MATH_REASONING & CAMBRIAN_IN_ONEVISION


def write_edits(root: Path) -> None:
    part1 = root / "SEED-Data-Edit-Part1-Openimages/auto_editing/openimages"
    part2 = root / "SEED-Data-Edit-Part2-3/real_editing"
    part3 = root / "SEED-Data-Edit-Part2-3/multi_turn_editing"
    single = {"source_image": "source_images/a.jpg", "target_image": "target_images/a.jpg", "instruction": "part one"}
    write_json_lines(part1 / "annotations/split_0001.jsonl", [single])
    write_json_lines(part1 / "annotations_GPT4V/split_0001.jsonl", [single | {"instruction_new": "rewritten"}])
    write_json_lines(
        part2 / "annotations/real.jsonl",
        [{"source_image": "a.jpg", "target_image": "b.jpg", "instruction": "part two"}],
    )
    turns = {"source_image": "x/0.jpg"}
    for turn in (1, 2):
        turns |= {f"instruction_{turn}": f"turn {turn}", f"edit_image_{turn}": f"x/{turn}.jpg"}
    turns |= {"instruction_3": None, "edit_image_3": None}  # in a table of rows with more turns
    write_json_lines(part3 / "annotations/split_0001.jsonl", [turns])
    for i, file in enumerate(
        [part1 / "images/source_images/a.jpg", part1 / "images/target_images/a.jpg"]
        + [part2 / "images/a.jpg", part2 / "images/b.jpg"]
        + [part3 / f"images/data/x/{turn}.jpg" for turn in range(3)]
    ):
        write_picture(file, seed=i)


def test_seed_data_edit(tmp_path):
    write_edits(tmp_path)
    rows = list(load_source("seed_data_edit", str(tmp_path), max_broken_share=0))
    assert captions(rows) == [f"<image>{text}" for text in ("part one", "turn 1", "turn 2", "part two")]
    assert {row["completion"] for row in rows} == {"<image>"} and {len(row["images"]) for row in rows} == {2}
    rewritten = load_source("seed_data_edit", str(tmp_path), annotations="annotations_GPT4V")
    assert captions(list(rewritten)) == ["<image>rewritten"]
    with pytest.raises(FileNotFoundError, match="no folder named annotation in"):
        load_source("seed_data_edit", str(tmp_path), annotations="annotation")


def test_seed_data_edit_turns_follow_each_other(tmp_path):
    write_edits(tmp_path)
    part3 = tmp_path / "SEED-Data-Edit-Part2-3/multi_turn_editing"
    first, second = load_source("seed_data_edit", str(part3), image_size=8)
    average = [[image.resize((1, 1)).getpixel((0, 0)) for image in row["images"]] for row in (first, second)]
    # The crops differ, the pictures are the same.
    assert average[0][1] == pytest.approx(average[1][0], abs=40) and average[0][0] != average[0][1]


@pytest.mark.parametrize(
    "task, name", [("canny", "canny"), ("inpainting", "inpainting"), ("colorization", "grayscale")]
)
def test_multigen(tmp_path, task, name):
    record = {
        "source": "./aesthetics_6_plus_0/1.jpg",
        f"control_{name}": f"group_0_{name}/1.jpg",
        "prompt": "a puma",
    }
    write_json_lines(tmp_path / f"json_files/aesthetics_plus_all_group_{name}_all.json", [record])
    write_picture(tmp_path / "images/aesthetics_6_plus_0/1.jpg", seed=1)
    write_picture(tmp_path / f"conditions/group_0_{name}/1.jpg", seed=2)
    (stored,) = load_source("multigen", str(tmp_path), task=task, image_size=8)
    (computed,) = load_source("multigen", str(tmp_path), task=task, image_size=8, conditions="computed")
    assert stored["prompt"] == computed["prompt"] and stored["prompt"].startswith("<image>")
    assert stored["prompt"].endswith("a puma") and stored["completion"] == "<image>"
    assert stored["images"][1].tobytes() == computed["images"][1].tobytes()
    assert stored["images"][0].tobytes() != computed["images"][0].tobytes()


def test_folder_of_pictures_and_texts(tmp_path):
    for i in range(3):
        write_picture(tmp_path / f"sub/{i}.png", seed=i)
        (tmp_path / f"sub/{i}.txt").write_text(f"picture {i}\n")
    assert captions(list(load_source("folder", str(tmp_path), stage="text_to_image"))) == [
        "picture 0",
        "picture 1",
        "picture 2",
    ]


def test_folder_of_pictures_of_any_name(tmp_path):
    for i, name in enumerate(["a.png", "b.PNG", "c [1].Jpg"]):
        write_picture(tmp_path / name, seed=i)
        (tmp_path / name).with_suffix(".txt").write_text(name)
    rows = load_source("folder", str(tmp_path), stage="text_to_image")
    assert captions(list(rows)) == ["a.png", "b.PNG", "c [1].Jpg"]


def test_folder_with_metadata(tmp_path):
    for i in range(2):
        write_picture(tmp_path / f"{i}.png", seed=i)
    write_json_lines(
        tmp_path / "metadata.jsonl", [{"file_name": f"{i}.png", "title": f"picture {i}"} for i in range(2)]
    )
    rows = list(load_source("folder", str(tmp_path), stage="text_to_image", caption="title"))
    assert captions(rows) == ["picture 0", "picture 1"]
    with pytest.raises(ValueError, match="no column text; the columns are image, title"):
        load_source("folder", str(tmp_path))


def test_parquet(tmp_path):
    pictures = [encoded(picture(seed=i), "PNG") for i in range(2)]
    pq.write_table(pa.table({"picture": pictures, "words": ["one", "two"]}), tmp_path / "bytes.parquet")
    options = {"stage": "text_to_image", "image": "picture", "caption": "words"}
    assert captions(list(load_source("parquet", str(tmp_path / "bytes.parquet"), **options))) == ["one", "two"]
    table = {"image": [picture(seed=i) for i in range(2)], "caption": ["one", "two"]}
    Dataset.from_dict(table).to_parquet(tmp_path / "image.parquet")
    rows = load_source("parquet", str(tmp_path / "image.parquet"), stage="text_to_image")
    assert captions(list(rows)) == ["one", "two"]


def test_gzip_lines(tmp_path):
    with gzip.open(tmp_path / "chat.jsonl.gz", "wt") as file:
        file.write(json.dumps({"conversations": [{"from": "human", "value": "Say PUMA."}, ANSWER]}) + "\n")
    (row,) = load_source("llavar", str(tmp_path / "chat.jsonl.gz"), images=str(tmp_path))
    assert row["messages"][1] == MESSAGES[1]


def test_rows_fit_the_collator(tmp_path, processor):
    """A pair with boxes either way round, an edit, a conversation and a text in one batch."""
    grounded = [img2dataset_sample(i, GRIT_CAPTION, (128, 87), **GRIT_SPANS) for i in range(8)]
    write_tar(tmp_path / "grit/0.tar", grounded)
    write_edits(tmp_path / "edits")
    (tmp_path / "pile").mkdir()
    (tmp_path / "pile/00.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(b'{"text": "plain"}\n'))
    write_json_lines(tmp_path / "chat.jsonl", [{"image": "0.jpg", "conversations": [QUESTION, ANSWER]}])
    write_picture(tmp_path / "0.jpg")
    pairs = list(load_source("grit", str(tmp_path / "grit")))
    assert {row["completion"] == "<image>" for row in pairs} == {True, False}
    rows = [
        *pairs,
        *load_source("seed_data_edit", str(tmp_path / "edits")),
        *load_source("llavar", str(tmp_path / "chat.jsonl"), images=str(tmp_path)),
        *load_source("the_pile", str(tmp_path / "pile")),
    ]
    batch = PumaDataCollator(processor)(rows)
    assert len(batch["input_ids"]) == len(rows) == 14
    assert len(batch["pixel_values"]) == len(batch["image_loss_mask"]) == 8 + 2 * 4 + 1
    assert batch["image_loss_mask"].sum() == sum(row["completion"] == "<image>" for row in rows if "completion" in row)


def test_captions_that_repeat_are_drawn_each_for_itself(tmp_path):
    """A caption alone would decide whether its pictures are drawn or described, and how they are cropped."""
    rows = [{"image": encoded(Image.new("RGB", (20 + i, 16)), "PNG"), "caption": "a cat"} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "0.parquet")
    made = list(load_source("parquet", str(tmp_path / "0.parquet"), stage="pretraining"))
    assert {row["completion"] for row in made} == {"a cat", "<image>"}


def test_a_subset_of_onevision_without_pictures(tmp_path):
    """Its column of pictures has no type; files are read in any order."""
    turns = [{"from": "human", "value": "Say PUMA."}, ANSWER]
    row = {"id": "1", "image": None, "conversations": turns, "data_source": "a text subset"}
    (tmp_path / "a text subset").mkdir()
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a text subset" / "0.parquet")
    image = {"bytes": encoded(picture(), "PNG"), "path": "1.png"}
    write_onevision(tmp_path, "b pictures", [{"id": "2", "image": image, "conversations": [QUESTION, ANSWER]}])
    rows = list(load_source("llava_onevision", str(tmp_path)))
    assert ["images" in row for row in rows] == [False, True]


@pytest.mark.parametrize("text", ["a <image>b", "a <ima<box>ge>b", "a <bo<image>x>b<box>"])
def test_nothing_in_a_text_from_the_data_is_markup(text):
    assert plain(text) == "a b"
