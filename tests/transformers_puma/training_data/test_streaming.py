"""Order, resuming, sharding and mixing."""

import pickle
from collections import Counter

import pytest
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from transformers_puma.training.data import build_training_data

from .writers import write_json_lines, write_laion_tars, write_picture


def text_of(row: dict) -> str:
    return (row["prompt"] + row["completion"]).replace("<image>", "")


def fingerprint(row: dict) -> tuple:
    return row["prompt"], row["completion"], *(image.tobytes() for image in row["images"])


def write_journeydb(folder, count: int) -> list[str]:
    prompts = [f"prompt {i}" for i in range(count)]
    records = [{"img_path": f"./000/{i % 3}.jpg", "prompt": prompt} for i, prompt in enumerate(prompts)]
    write_json_lines(folder / "train_anno_realease_repath.jsonl", records)
    for i in range(3):
        write_picture(folder / f"imgs/000/{i}.jpg", seed=i)
    return prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four tars of five pairs, and one file of 11 lines."""
    path = tmp_path_factory.mktemp("data")
    path.joinpath("expected").write_text("\n".join(write_laion_tars(path / "laion", 4, 5) + write_journeydb(path, 11)))
    return path


def build(folder, **options):
    sources = [
        {"name": "laion_aesthetics", "path": str(folder / "laion"), "weight": 2},
        {"name": "journeydb", "path": str(folder)},
    ]
    defaults = {"seed": 3, "image_size": 8, "shuffle_buffer": 4, "num_shards": 4}
    return build_training_data(sources, **{"stage": "text_to_image", **defaults, **options})


def expected(folder) -> Counter:
    return Counter(folder.joinpath("expected").read_text().split("\n"))


@pytest.mark.parametrize("stopping_strategy", ["all_exhausted", "all_exhausted_without_replacement"])
def test_resumes_at_every_row(folder, stopping_strategy):
    options = {"stopping_strategy": stopping_strategy, "stage": "pretraining"}
    rows = [fingerprint(row) for row in build(folder, **options)]
    data = build(folder, **options)
    states = []
    for _ in data:
        states.append(data.state_dict())
    assert len(states) == len(rows)
    for position in range(0, len(rows), 3):
        resumed = build(folder, **options)
        resumed.load_state_dict(states[position])
        assert [fingerprint(row) for row in resumed] == rows[position + 1 :], position


@pytest.mark.parametrize("strategy", ["auto", "shards"])
def test_two_ranks_and_two_workers_see_each_sample_once(folder, strategy):
    data = build(folder, stopping_strategy="all_exhausted_without_replacement")
    seen = Counter()
    for rank in range(2):
        split = split_dataset_by_node(data, rank, 2, strategy=strategy)
        loader = DataLoader(split, batch_size=None, num_workers=2)
        rows = [text_of(row) for row in loader]
        assert 0.2 < len(rows) / 31 < 0.8
        seen.update(rows)
    assert seen == expected(folder)


def test_more_readers_than_files(folder):
    """One file of lines is shared by two ranks with two workers each, all of which have something to do."""
    sources = [{"name": "journeydb", "path": str(folder)}]
    data = build_training_data(sources, "text_to_image", shuffle_buffer=0, num_shards=4)
    seen = []
    for rank in range(2):
        for worker in range(2):
            shard = data.shard(2, rank, contiguous=False).shard(2, worker)
            seen.append([text_of(row) for row in shard])
    assert [len(rows) for rows in seen] == [3, 3, 3, 2]
    assert Counter(sum(seen, [])) == Counter(f"prompt {i}" for i in range(11))


def test_shards_of_a_mix(folder, caplog):
    """What accelerate does with a stream; three shards do not divide the four files of a source."""
    data = build(folder, stopping_strategy="all_exhausted_without_replacement", num_shards=3)
    seen = Counter()
    for rank in range(3):
        rows = [text_of(row) for row in data.shard(num_shards=3, index=rank)]
        assert rows
        seen.update(rows)
    assert seen == expected(folder)
    assert "nothing to read" not in caplog.text
    build(folder, num_shards=5)
    assert "laion_aesthetics has 4 shards for num_shards=5" in caplog.text


def test_travels_to_spawned_workers(folder):
    data = build(folder, shuffle_buffer=0)
    assert [fingerprint(row) for row in pickle.loads(pickle.dumps(data))] == [fingerprint(row) for row in data]


def test_crops_and_directions_do_not_depend_on_the_reader(folder):
    options = {"stage": "pretraining", "stopping_strategy": "all_exhausted_without_replacement"}
    whole = {text_of(row): fingerprint(row) for row in build(folder, **options)}
    split = {}
    for rank in range(3):
        data = split_dataset_by_node(build(folder, **options, shuffle_buffer=0, num_shards=1), rank, 3)
        split |= {text_of(row): fingerprint(row) for row in data}
    assert split == whole
    other = {text_of(row): fingerprint(row) for row in build(folder, **options, seed=4)}
    assert other.keys() == whole.keys() and other != whole


def test_shuffles_files_and_blocks(folder):
    sources = [{"name": "laion_2b", "path": str(folder / "laion")}]

    def order(**options):
        rows = build_training_data(sources, "text_to_image", **options)
        return [int(text_of(row).removeprefix("caption ")) for row in rows]

    assert order(shuffle_buffer=0) == list(range(20))
    assert sorted(order(seed=0)) == list(range(20))
    assert order(seed=0) != order(seed=1) and order(seed=0) == order(seed=0)


def test_mixes_in_proportion_to_the_weights(folder):
    data = build(folder, stopping_strategy="all_exhausted")
    rows = []
    while len(rows) < 300:
        rows += [text_of(row) for row in data]
    share = sum(row.startswith("caption") for row in rows) / len(rows)
    assert share == pytest.approx(2 / 3, abs=0.1)


def test_epochs_have_another_order(folder):
    data = build(folder, stopping_strategy="all_exhausted_without_replacement")
    first = [text_of(row) for row in data]
    data.set_epoch(1)
    second = [text_of(row) for row in data]
    assert first != second and Counter(first) == Counter(second)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stage": "tuning"}, "stage must be one of decoder, .*, got 'tuning'"),
        ({"sources": []}, "at least one source"),
        ({"sources": [{"name": "laion_5b", "path": "x"}]}, "source must be one of laion_2b, .*, got 'laion_5b'"),
        ({"sources": [{"name": "grit"}]}, "'grit' needs a path"),
        ({"sources": [{"name": "grit", "path": "x", "phrase": "y"}]}, "no option phrase; it has .*phrases"),
        ({"sources": [{"name": "multigen", "path": "x"}], "stage": "conditional"}, "needs the option task"),
        ({"sources": [{"name": "the_pile", "path": "x"}]}, "takes pair sources; 'the_pile' is text"),
        ({"sources": [{"name": "grit", "path": "x", "weight": 0}]}, "weight of 'grit' must be positive, got 0"),
        ({"image_size": 0}, "image_size must be None or at least 1, got 0"),
        ({"num_shards": 0}, "num_shards must be at least 1, got 0"),
        ({"stopping_strategy": "never"}, "stopping_strategy must be one of all_exhausted, .*, got 'never'"),
        ({"max_broken_share": 2}, "max_broken_share must be between 0 and 1, got 2"),
    ],
)
def test_bad_arguments(folder, changes, message):
    arguments = {"sources": [{"name": "laion_2b", "path": str(folder / "laion")}], "stage": "text_to_image"}
    with pytest.raises(ValueError, match=message):
        build_training_data(**{**arguments, **changes})


def test_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no files at .*nowhere"):
        build_training_data([{"name": "laion_2b", "path": str(tmp_path / "nowhere")}], "text_to_image")
