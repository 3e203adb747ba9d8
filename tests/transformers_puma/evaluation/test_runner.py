"""The runner: who computes what, what a kill leaves, and the numbers at the end."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from transformers_puma.evaluation.runner import (
    ArrayFile,
    Shard,
    read_arrays,
    read_rows,
    run_samples,
    sample_seed,
    weights_fingerprint,
    write_results,
)

SETTINGS = {"model": "m", "steps": 3, "seeds": [0, 1]}
SAMPLES = list(range(10, 17))


def squares(samples: list[int]) -> list[dict]:
    return [{"square": sample**2} for sample in samples]


def run(folder: Path, batch_fn=squares, samples=SAMPLES, settings=SETTINGS, **options):
    return run_samples(samples, batch_fn, folder, settings=settings, **options)


def test_rows_come_in_the_order_of_the_samples(tmp_path):
    rows = run(tmp_path, batch_size=3)
    assert rows == [{"index": index, "square": sample**2} for index, sample in enumerate(SAMPLES)]


def test_two_processes_share_the_samples_and_the_last_one_sees_all(tmp_path):
    seen: dict[int, list[int]] = {0: [], 1: []}

    def noting(rank):
        return lambda samples: seen[rank].extend(samples) or squares(samples)

    assert run(tmp_path / "two", noting(0), shard=Shard(0, 2), batch_size=2) is None
    rows = run(tmp_path / "two", noting(1), shard=Shard(1, 2), batch_size=3)
    assert seen == {0: [10, 12, 14, 16], 1: [11, 13, 15]}
    assert rows == run(tmp_path / "one")


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    calls = []

    def dies_in_the_third_batch(samples):
        calls.append(samples)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return squares(samples)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, dies_in_the_third_batch, batch_size=2)
    with (tmp_path / "samples-00000.jsonl").open("ab") as file:
        file.write(b'{"index": 4, "squ')  # a line that the kill cut
    assert len(list(read_rows(tmp_path))) == 4
    later = []
    rows = run(tmp_path, lambda samples: later.extend(samples) or squares(samples), batch_size=1)
    assert later == SAMPLES[4:]
    assert rows == run(tmp_path.parent / "unbroken")


def test_other_processes_rows_count_after_a_change_of_their_number(tmp_path):
    run(tmp_path, shard=Shard(1, 3))
    later = []
    rows = run(tmp_path, lambda samples: later.extend(samples) or squares(samples))
    assert later == [10, 12, 13, 15, 16] and len(rows) == 7


def test_a_longer_run_goes_on_from_a_shorter_one(tmp_path):
    run(tmp_path, samples=SAMPLES[:3])
    later = []
    run(tmp_path, lambda samples: later.extend(samples) or squares(samples))
    assert later == SAMPLES[3:]


def test_a_folder_holds_one_run_only(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="steps = 3, and this one has 4"):
        run(tmp_path, settings={**SETTINGS, "steps": 4})
    assert json.loads((tmp_path / "settings.json").read_text()) == SETTINGS


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="no samples"):
        run(tmp_path, samples=[])
    with pytest.raises(ValueError, match="1 rows for 2 samples"):
        run(tmp_path, lambda samples: squares(samples)[:1], batch_size=2)
    with pytest.raises(ValueError, match="JSON compliant"):
        run(tmp_path, lambda samples: [{"score": float("nan")} for _ in samples])


def test_shard_from_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Shard.from_environment() == Shard(0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Shard.from_environment() == Shard(2, 4)


def test_seeds_depend_on_seed_and_sample_alone():
    seeds = {sample_seed(seed, sample) for seed in (0, 1) for sample in (0, 1, "0/1", "a.png")}
    assert len(seeds) == 8 and all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(0, 1) == sample_seed(0, "1") != sample_seed(1, 0)


def test_arrays_lie_beside_the_rows(tmp_path):
    first, second = ArrayFile(tmp_path, Shard(0, 2)), ArrayFile(tmp_path, Shard(1, 2))
    vectors = np.arange(12, dtype=np.float32).reshape(4, 3) / 7
    places = [file.append(vector) for file, vector in zip([first, second, first, second], vectors, strict=True)]
    assert [place["offset"] for place in places] == [0, 0, 12, 12]
    np.testing.assert_array_equal(read_arrays(tmp_path, places[::-1]), vectors[::-1])


def test_results_file(tmp_path):
    scores = {"0": {"psnr_r": {"mean": 20.0}}}
    file = write_results(tmp_path, task="reconstruction", scores=scores, settings=SETTINGS, num_samples=7)
    results = json.loads(file.read_text())
    assert results["scores"] == scores and results["settings"] == SETTINGS
    assert {"python", "torch", "transformers"} <= results["versions"].keys()
    assert list(tmp_path.iterdir()) == [file]


def test_weights_are_told_apart(tmp_path):
    """By each tensor, of which training may change one alone, and by the settings."""
    (tmp_path / "mllm").mkdir()

    def fingerprint(**changed: np.ndarray) -> str:
        tensors = {name: np.zeros(size, dtype=np.float32) for name, size in (("a", 100_000), ("b", 5), ("c", 300_000))}
        save_file(tensors | changed, tmp_path / "mllm" / "model.safetensors")
        return weights_fingerprint(tmp_path)

    found = {fingerprint(), fingerprint(a=np.ones(100_000, np.float32)), fingerprint(b=np.ones(5, np.float32))}
    found |= {fingerprint(c=np.ones(300_000, np.float32)), fingerprint(b=np.zeros((5, 1), np.float32))}
    assert len(found) == 5
    (tmp_path / "notes.txt").write_text("no weights")
    assert weights_fingerprint(tmp_path) in found
    (tmp_path / "chat_template.jinja").write_text("another")
    assert weights_fingerprint(tmp_path) not in found
