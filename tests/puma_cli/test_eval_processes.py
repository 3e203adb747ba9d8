"""All five evaluations in real processes: one, two of torchrun, and one that SIGKILL ends and that starts again.

A batch of one sample does the same arithmetic wherever it runs, so that all rows must be equal to the last bit.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.diffusers_puma.evaluation.conftest import distribution  # noqa: F401

from .test_eval import edits, pictures  # noqa: F401

TASKS = ("reconstruction", "generation", "editing", "features", "understanding")
RESULTS = {**{task: f"{task}/results.json" for task in TASKS}, "understanding": "understanding/questions/results.json"}


@pytest.fixture(scope="module")
def commands(full_folder, pictures, edits, distribution, tmp_path_factory):  # noqa: F811
    """`commands(folder)`: a command line for each evaluation, whose runs lie in `folder`."""
    table = tmp_path_factory.mktemp("questions")
    for index, file in enumerate(sorted(pictures.rglob("*.png"))):
        (table / f"{index}.png").write_bytes(file.read_bytes())
    rows = [{"image": f"{i}.png", "question": "What" + "?" * i, "answer": "noto"} for i in range(5)]
    (table / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    drawn = f"--scale 3 --size 32 --lpips-weights {distribution}"
    options = {
        "reconstruction": f"--data {pictures} {drawn}",
        "generation": f"--data {edits} {drawn} --metrics lpips frechet_alexnet",
        "editing": f"--data {edits} {drawn} --metrics lpips",
        "features": f"--data {edits} --edits {drawn}",
        "understanding": f"--benchmark questions --data {table} --max-new-tokens 3",
    }

    def make(folder: Path, batch_size: int = 1) -> list[str]:
        more = f"--model {full_folder} --device cpu --batch-size {batch_size}"
        return [f"{task} {options[task]} {more} --out {folder / task}" for task in TASKS]

    return make


def call(commands: list[str], processes: int = 1, **environment: str) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launch = launch if processes > 1 else [sys.executable]
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [*launch, "-m", "tests.puma_cli.eval_run", *commands],
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def read(folder: Path, task: str) -> tuple[list[dict], dict]:
    """The rows of a run in order, without where its vectors lie, and its results."""
    file = folder / RESULTS[task]
    lines = [line for part in file.parent.glob("samples-*.jsonl") for line in part.read_text().splitlines()]
    rows = sorted(map(json.loads, lines), key=lambda row: row["index"])
    return [{key: row[key] for key in row if key not in ("features", "mean")} for row in rows], json.loads(
        file.read_text()
    )


@pytest.fixture(scope="module")
def alone(commands, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    result = call(commands(folder))
    assert result.returncode == 0, result.stderr
    # The progress bar: time taken < time left.
    assert re.search(r"reconstruction: .*5/5 \[\d\d:\d\d<\d\d:\d\d", result.stderr)
    return folder


def test_two_processes_are_one(commands, alone, tmp_path):
    result = call(commands(tmp_path), processes=2, WORLDS=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    for task in TASKS:
        shares = [
            {json.loads(line)["index"] % 2 for line in file.read_text().splitlines()}
            for file in sorted((tmp_path / RESULTS[task]).parent.glob("samples-*.jsonl"))
        ]
        assert shares == [{0}, {1}], task
        assert read(tmp_path, task) == read(alone, task), task


def test_a_killed_run_ends_as_one_that_was_not(commands, alone, tmp_path):
    for command, task in zip(commands(tmp_path), TASKS, strict=True):
        killed = call([command], KILL_AFTER="1")
        assert killed.returncode == -9, killed.stderr
        assert not (tmp_path / RESULTS[task]).exists()
        (part,) = (tmp_path / RESULTS[task]).parent.glob("samples-*.jsonl")
        assert part.read_text().count("\n") == 1
        with part.open("a") as stream:
            stream.write('{"index": 1, "sco')  # as if it had died while it wrote
    result = call(commands(tmp_path))
    assert result.returncode == 0, result.stderr
    for task in TASKS:
        assert read(tmp_path, task) == read(alone, task), task


def test_batches_change_rounding_at_most(commands, alone, tmp_path):
    result = call(commands(tmp_path, batch_size=3))
    assert result.returncode == 0, result.stderr
    for task in TASKS:
        results, expected = read(tmp_path, task)[1], read(alone, task)[1]
        assert results["settings"] == expected["settings"], task
        for row, metrics in expected["scores"].items():
            for metric, score in metrics.items():
                # A grey level more or less, where a value lies between two.
                near = pytest.approx(score["mean"], abs=2e-2, rel=1e-2)
                assert results["scores"][row][metric]["mean"] == near, (task, row, metric)


def test_mistakes_in_processes_have_status_2(tmp_path):
    result = call([shlex.join(["reconstruction", "--data", str(tmp_path / "none")])])
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith("puma: error: no such data")
