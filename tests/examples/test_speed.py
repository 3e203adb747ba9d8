"""The benchmark runs, and its pairs do the same work; how fast is no matter of a test."""

import argparse
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "benchmark"
sys.path.insert(0, str(FOLDER))

import speed  # noqa: E402


def test_every_benchmark_runs(tmp_path, capsys):
    out = tmp_path / "speed.json"
    small = ["--pairs", "2", "--batch_size", "1", "--text_length", "4", "--scale", "3", "--device", "cpu"]
    speed.main([*small, "--out", str(out)])
    results = json.loads(out.read_text())
    assert results.pop("arguments")["scale"] == 3
    assert list(results) == [
        *("language model, pictures", "language model, cached features"),
        *("decoder of 4 tokens, plain", "decoder of 4 tokens, text projected"),
        "generation of 5 tokens",
    ]
    assert all(found["ratio"] > 0 and found["pairs"] == 2 for found in results.values())
    assert capsys.readouterr().out.count("of stock") == 5


@pytest.mark.parametrize(("processor_time", "clock"), [(False, "perf_counter"), (True, "process_time")])
def test_the_ratio_is_of_times_stock_over_ours(monkeypatch, processor_time, clock):
    ticks = {"ours": 1, "stock": 3}
    now = [0.0]
    monkeypatch.setattr(speed.time, clock, lambda: now[0])

    def call(name):
        now[0] += ticks[name]

    args = argparse.Namespace(pairs=5, device="cpu", processor_time=processor_time)
    found = speed.ratio(lambda: call("ours"), lambda: call("stock"), args)
    assert found["ratio"] == pytest.approx(3) and found["quartiles"] == [3, 3] and found["seconds"] == 1


def test_unknown_benchmarks_are_refused(capsys):
    with pytest.raises(SystemExit):
        speed.main(["everything"])
    assert "everything" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        speed.main(["--device", "cuda", "--processor_time"])
    assert "--processor_time is for --device cpu" in capsys.readouterr().err
