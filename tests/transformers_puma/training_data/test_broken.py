"""Broken samples are skipped, counted and named; too many stop the stream."""

import gzip
import json
import logging

import pytest
import zstandard
from datasets import Features, IterableDataset, Value
from torch.utils.data import DataLoader

from transformers_puma.training.data import (
    BrokenSampleError,
    SampleCounter,
    TooManyBrokenSamplesError,
    build_training_data,
    load_source,
)
from transformers_puma.training.data.readers import Reader
from transformers_puma.training.data.samples import make_sample

from .writers import encoded, img2dataset_sample, picture, truncated, write_json_lines, write_picture, write_tar

LOGGER = "transformers_puma.training.data"


def messages(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith(LOGGER)]


def test_broken_pairs(tmp_path, caplog):
    samples = [img2dataset_sample(i, f"caption {i}", (64, 64)) for i in range(7)]
    samples[0]["jpg"] = truncated(picture(64, 64))
    del samples[1]["txt"]
    del samples[2]["jpg"]
    samples[3]["txt"] = b"  "
    samples[4]["jpg"] = b"<html>404</html>"
    write_tar(tmp_path / "00000.tar", samples)
    with caplog.at_level(logging.WARNING, LOGGER):
        rows = list(load_source("laion_2b", str(tmp_path), stage="text_to_image"))
    assert [row["prompt"] for row in rows] == ["caption 5", "caption 6"]
    said = messages(caplog)
    assert len(said) == 5
    for key, reason in [
        ("000000000", "unreadable picture: image file is truncated"),
        ("000000001", "'txt' is missing or empty"),
        ("000000002", "no picture in the field 'jpg'"),
        ("000000003", "'txt' is missing or empty"),
        ("000000004", "unreadable picture: cannot identify image file"),
    ]:
        assert any("laion_2b: skipped" in line and key in line and reason in line for line in said), reason
    assert any("(5 of 5 samples broken)" in line for line in said)


@pytest.mark.parametrize(
    "entry, reason",
    [
        ([0, 5, 0.5, 0.1, 0.5, 0.9, 0.8], "has no area"),
        ([0, 5, 0.9, 0.1, 0.5, 0.9, 0.8], "has no area"),
        ([0, 99, 0.1, 0.1, 0.5, 0.9, 0.8], "lies outside the caption"),
        ([0, 5, 0.1, 0.1, 0.5], r"must be \[start, end"),
        (None, r"must be \[start, end"),
        ([0, 5, 0.1, 0.1, "0.5", 0.9, 0.8], r"must be \[start, end"),
    ],
)
def test_broken_boxes(tmp_path, caplog, entry, reason):
    good = [0, 5, 0.1, 0.1, 0.9, 0.9, 0.8]
    samples = [
        img2dataset_sample(i, "a cat", noun_chunks=[e], ref_exps=[e]) for i, e in enumerate([good, entry, good])
    ]
    write_tar(tmp_path / "0.tar", samples)
    with caplog.at_level(logging.WARNING, LOGGER):
        assert len(list(load_source("grit", str(tmp_path)))) == 2
    (said,) = messages(caplog)
    assert "000000001" in said
    with pytest.raises(TooManyBrokenSamplesError, match=reason):
        list(load_source("grit", str(tmp_path), max_broken_share=0, min_samples=1))


def conversation(*values: str) -> list[dict]:
    return [{"from": role, "value": value} for role, value in zip(("human", "gpt") * 2, values, strict=False)]


SAID = conversation("What?", "This.")


@pytest.mark.parametrize(
    "record, reason",
    [
        ('{"conversations": [', "not JSON"),
        ([1, 2], "must be a JSON object, got a list"),
        ({"image": "a.png"}, "'conversations' is missing or empty"),
        ({"image": "gone.png", "conversations": conversation("What?", "This.")}, "gone.png"),
        ({"image": "a.png", "conversations": conversation("What?")}, "turns must alternate"),
        ({"image": "a.png", "conversations": conversation("What?", "<image>")}, None),
        ({"image": "a.png", "conversations": conversation("<image><image>", "This.")}, "2 <image> but there are 1"),
        ({"conversations": conversation("<image> What?", "This.")}, "1 <image> but there are 0"),
        ({"conversations": [{"from": "robot", "value": "What?"}]}, "from 'robot'"),
        ({"conversations": conversation("What?", "")}, "'value' is missing or empty"),
        ({"conversations": ["What?", "This."]}, "must be a JSON object, got a str"),
        ({"conversations": conversation("What? \ud83d", "This.")}, "'value' is no Unicode"),
        ({"conversations": [{"from": ["human"], "value": "What?"}]}, "'from' must be a str, got a list"),
        ({"conversations": [*SAID, {"from": "system", "value": "Be brief."}, *SAID]}, "turns must alternate"),
        ({"image": 7, "conversations": SAID}, "'image' must be a path or a list of paths, got 7"),
    ],
)
def test_broken_conversations(tmp_path, caplog, record, reason):
    write_picture(tmp_path / "a.png")
    good = {"image": "a.png", "conversations": conversation("<image>\nWhat?", "This.")}
    file = write_json_lines(tmp_path / "chat.jsonl", [good, record, good])
    with caplog.at_level(logging.WARNING, LOGGER):
        rows = list(load_source("llavar", str(file), images=str(tmp_path)))
    assert len(rows) == (3 if reason is None else 2)
    if reason is not None:
        (said,) = messages(caplog)
        assert "chat.jsonl:2" in said and reason in said


def test_entries_of_a_json_file(tmp_path, caplog):
    """An entry without answers does not end the file."""
    entry = {"imageURL": "http://x/1.jpg", "questions": ["Who?"], "answers": ["She."], "split": 1}
    (tmp_path / "dataset.json").write_text(json.dumps({"a": entry, "b": entry | {"answers": []}, "c": entry}))
    for key in "ac":
        write_picture(tmp_path / f"images/{key}.jpg")
    with caplog.at_level(logging.WARNING, LOGGER):
        assert len(list(load_source("ocr_vqa", str(tmp_path)))) == 2
    assert "dataset.json:b: the field 'answers' is missing or empty" in messages(caplog)[0]


def test_json_member_that_is_none(tmp_path, caplog):
    good = {"noun_chunks": [[0, 5, 0.1, 0.1, 0.9, 0.9, 0.8]]}
    samples = [img2dataset_sample(i, "a cat", **good) for i in range(3)]
    samples[1]["json"] = b'{"caption": "a c'
    write_tar(tmp_path / "0.tar", samples)
    with caplog.at_level(logging.WARNING, LOGGER):
        assert len(list(load_source("grit", str(tmp_path)))) == 2
    assert "0.tar:000000001: not JSON" in messages(caplog)[0]


def test_tar_cut_short(tmp_path, caplog):
    """What came before the cut is read, and so are the other tars."""
    for tar in range(2):
        samples = [img2dataset_sample(i, f"tar {tar} caption {i}", (64, 64)) for i in range(4)]
        write_tar(tmp_path / f"{tar}.tar", samples)
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: whole.index(b"000000002.jpg") + 700])
    with caplog.at_level(logging.WARNING, LOGGER):
        rows = list(load_source("laion_2b", str(tmp_path), stage="text_to_image"))
    assert [row["prompt"] for row in rows] == [
        *(f"tar 0 caption {i}" for i in range(2)),
        *(f"tar 1 caption {i}" for i in range(4)),
    ]
    (said,) = messages(caplog)
    assert "0.tar:the rest of the file: the file cannot be read from here on" in said


@pytest.mark.parametrize("extension", ["gz", "zst"])
def test_lines_cut_short(tmp_path, caplog, extension):
    lines = [json.dumps({"conversations": conversation(f"What {i}?", "x" * 50)}) for i in range(2000)]
    compress = gzip.compress if extension == "gz" else zstandard.ZstdCompressor().compress
    compressed = compress("\n".join(lines).encode())
    file = tmp_path / f"chat.jsonl.{extension}"
    file.write_bytes(compressed[:-40])
    with caplog.at_level(logging.WARNING, LOGGER):
        rows = list(load_source("llavar", str(file), images=str(tmp_path)))
    assert len(rows) < 2000
    (said,) = messages(caplog)
    assert f"chat.jsonl.{extension}:{len(rows) + 1}: " in said


def test_json_file_that_is_none(tmp_path):
    (tmp_path / "chat.json").write_text('[{"conversations": ')
    with pytest.raises(ValueError, match="chat.json is not JSON"):
        list(load_source("llavar", str(tmp_path / "chat.json"), images=str(tmp_path)))


def write_mixed(folder, num_broken: int, num_samples: int = 20) -> None:
    samples = [img2dataset_sample(i, f"caption {i}", (64, 64)) for i in range(num_samples)]
    for sample in samples[:num_broken]:
        sample["jpg"] = truncated(picture(64, 64))
    write_tar(folder / "0.tar", samples[::-1])


def test_too_many_broken_samples_stop_the_stream(tmp_path):
    write_mixed(tmp_path / "bad", num_broken=6)
    write_mixed(tmp_path / "good", num_broken=0)
    sources = [{"name": "laion_2b", "path": str(tmp_path / name)} for name in ("good", "bad")]
    options = {"shuffle_buffer": 0, "stopping_strategy": "all_exhausted_without_replacement", "min_samples": 15}
    allowed = build_training_data(sources, "text_to_image", max_broken_share=0.3, **options)
    assert len(list(allowed)) == 34
    strict = build_training_data(sources, "text_to_image", max_broken_share=0.2, **options)
    with pytest.raises(
        TooManyBrokenSamplesError, match=r"laion_2b\[1\]: \d of (19|20) samples broken, .*share of 0.2.*truncated"
    ):
        list(strict)
    late = build_training_data(sources, "text_to_image", max_broken_share=0.2, **options | {"min_samples": 21})
    assert len(list(late)) == 34


def test_the_share_is_of_samples_not_of_records():
    """Of each record's four samples one is broken; a record that cannot be parsed counts as one."""

    def torn(*_) -> list:
        raise BrokenSampleError("torn")

    stream = IterableDataset.from_generator(lambda: iter([{"a": 1}] * 8), features=Features({"a": Value("int64")}))
    counter = SampleCounter("source", max_broken_share=0.3, min_samples=8)
    whole = Reader(stream, lambda raw: [make_sample("key", {})] * 4, str).samples(counter)
    for number, _ in enumerate(whole):
        if number % 4 == 0:
            assert counter.skip_if_broken("place", torn) == []
    assert (counter.read, counter.broken) == (32, 8)
    records = SampleCounter("source", max_broken_share=1)
    assert list(Reader(stream, torn, str).samples(records)) == []
    assert (records.read, records.broken) == (8, 8)


def test_a_worker_stops_the_loader(tmp_path):
    write_mixed(tmp_path, num_broken=10)
    data = load_source("laion_2b", str(tmp_path), stage="text_to_image", max_broken_share=0.1, min_samples=5)
    with pytest.raises(TooManyBrokenSamplesError):
        list(DataLoader(data, batch_size=None, num_workers=1))


def test_resuming_over_broken_samples(tmp_path):
    samples = [img2dataset_sample(i, f"caption {i}") for i in range(12)]
    for i in (0, 3, 4, 11):
        samples[i]["jpg"] = encoded(picture())[:50]
    write_tar(tmp_path / "0.tar", samples)
    sources = [{"name": "laion_2b", "path": str(tmp_path)}]
    data = build_training_data(sources, "text_to_image", shuffle_buffer=5)
    prompts, states = [], []
    for row in data:
        prompts.append(row["prompt"])
        states.append(data.state_dict())
    assert len(prompts) == 8
    for position, state in enumerate(states):
        data.load_state_dict(state)
        assert [row["prompt"] for row in data] == prompts[position + 1 :]
