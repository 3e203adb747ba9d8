"""Configs and weight files that are damaged are named, as users find them: cut off, or the pointers of git LFS."""

import json
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from puma_files import read_json, read_safetensors_header, shard_files, unreadable, whole_file

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def test_header(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"b": torch.zeros(2, 3), "a": torch.zeros(4, dtype=torch.float16)}, file, metadata={"format": "pt"})
    header = read_safetensors_header(file)
    assert {name: (tensor["dtype"], tensor["shape"]) for name, tensor in header.items()} == {
        "a": ("F16", [4]),
        "b": ("F32", [2, 3]),
    }
    assert sum(end - start for start, end in (tensor["data_offsets"] for tensor in header.values())) == 2 * 4 + 4 * 6


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:9],
        lambda content: content + b"a",
        lambda content: POINTER,
        lambda content: b"",
        lambda content: content.replace(b'"shape"', b'"shapf"'),
    ],
)
def test_damaged_weights(tmp_path, damage):
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2, 3)}, file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))} is no complete safetensors file .*: it may be cut"):
        read_safetensors_header(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON: Expecting"),
        (POINTER, "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON: 'utf-8' codec"),
        (b"[]", "must hold a JSON object, found a list"),
    ],
)
def test_damaged_json(tmp_path, content, message):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))} {message}"):
        read_json(file)


def test_shards(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "2", "b": "part/1", "c": "2"}}))
    (tmp_path / "2").touch()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/part/1 is missing, but model.safetensors.index.json"):
        shard_files(index)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "1").touch()
    assert shard_files(index) == [tmp_path / "2", tmp_path / "part" / "1"]
    index.write_text("{}")
    with pytest.raises(ValueError, match="index.json is no index of weights: it has no weight_map"):
        shard_files(index)
    for outside in ("../2", "/2"):
        index.write_text(json.dumps({"weight_map": {"a": outside}}))
        with pytest.raises(ValueError, match=f"must name files of its own folder, found {outside}"):
            shard_files(index)


def test_no_advice_to_unpickle(tmp_path):
    """torch answers code in a file with how to run it."""
    torch.save({"a": pytest.fail}, tmp_path / "a.bin")
    with pytest.raises(pickle.UnpicklingError, match="weights_only") as failure:
        torch.load(tmp_path / "a.bin", weights_only=True)
    assert unreadable(failure.value) == "it holds something else than tensors"
    assert unreadable(RuntimeError("one\nthing")) == "RuntimeError: one thing"
    assert len(unreadable(RuntimeError("word " * 500))) <= 300


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    file = tmp_path / "a.png"
    file.write_text("old")
    with pytest.raises(OSError, match="disk full"), whole_file(file) as unfinished:
        unfinished.write_text("ne")
        assert file.read_text() == "old" and list(tmp_path.glob("*.png")) == [file]
        raise OSError("disk full")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    with whole_file(file) as unfinished:
        unfinished.write_text("new")
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]
