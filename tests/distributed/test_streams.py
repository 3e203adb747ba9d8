"""Two processes share a stream of two files of unlike length: each reads its own, again and again, and none waits."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from datasets import IterableDataset
from transformers import Trainer

from tests.diffusers_puma.training import tiny
from tests.transformers_puma.conftest import make_model, make_picture, make_processor
from transformers_puma.training import (
    PumaDPOConfig,
    PumaDPOTrainer,
    PumaSFTConfig,
    PumaSFTTrainer,
    PumaTrainer,
    PumaTrainingArguments,
)

from .test_language_model import torchrun
from .training_runs import leave

FILES = [(0, 1, 2, 3, 4), (5, 6, 7)]
OPTIONS = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
LANGUAGE_MODEL = {
    "puma": (PumaTrainer, PumaTrainingArguments, {}),
    "sft": (PumaSFTTrainer, PumaSFTConfig, {"bf16": False}),
    "dpo": (PumaDPOTrainer, PumaDPOConfig, {"bf16": False}),
}
KINDS = [*LANGUAGE_MODEL, "decoder"]


def make_row(kind: str, number: int) -> dict:
    if kind == "decoder":
        return {"latents": torch.zeros(4, 8, 8), "features": torch.full((16, tiny.CHANNELS), float(number))}
    if kind == "dpo":
        return {"prompt": str(number), "chosen": "yes", "rejected": "no"}
    return {"prompt": str(number), "completion": "<image>", "images": [make_picture(number)]}


def read(files: list[tuple[int, ...]], kind: str) -> Iterator[dict]:
    for numbers in files:
        for number in numbers:
            yield make_row(kind, number)


def number_of(row: dict) -> int:
    return int(row["features"][0, 0] if "features" in row else row["prompt"])


def make_stream(kind: str) -> IterableDataset:
    return IterableDataset.from_generator(read, gen_kwargs={"files": FILES, "kind": kind})


def make_trainer(kind: str, folder: Path) -> Trainer:
    stream = make_stream(kind)
    if kind == "decoder":
        components = {"null_features": torch.zeros(1, 16, tiny.CHANNELS)}
        return tiny.trainer(folder, train_dataset=stream, components=components, **OPTIONS)
    trainer_class, arguments_class, options = LANGUAGE_MODEL[kind]
    arguments = arguments_class(str(folder), **OPTIONS, **options)
    processor = make_processor()
    return trainer_class(make_model(processor), args=arguments, processing_class=processor, train_dataset=stream)


def main(folder: str) -> None:
    """Leaves in `folder`/`kind`_`rank`.json the rows that this process read, to train and to evaluate."""
    for kind in KINDS:
        trainer, seen = make_trainer(kind, Path(folder, kind)), []
        collate = trainer.data_collator
        trainer.data_collator = lambda rows, collate=collate, seen=seen: (
            seen.extend(map(number_of, rows)) or collate(rows)
        )
        trainer.train()
        numbers = [list(seen)]
        seen.clear()
        trainer.evaluate(make_stream(kind))
        numbers.append(seen)
        assert dist.get_world_size() == trainer.accelerator.num_processes == 2
        Path(folder, f"{kind}_{dist.get_rank()}.json").write_text(json.dumps(numbers))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    torchrun("tests.distributed.test_streams", str(folder))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_each_process_reads_its_own_file_again_and_again(folder, kind):
    seen = [json.loads((folder / f"{kind}_{rank}.json").read_text())[0] for rank in range(2)]
    assert seen[0][:8] == [0, 1, 2, 3, 4, 0, 1, 2]
    assert seen[1][:8] == [5, 6, 7, 5, 6, 7, 5, 6]


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_shares_batches_evenly(folder, kind):
    seen = [json.loads((folder / f"{kind}_{rank}.json").read_text())[1] for rank in range(2)]
    assert seen == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize("kind", KINDS)
def test_no_process_reads_for_the_others(tmp_path, kind):
    arguments = make_trainer(kind, tmp_path).args
    assert arguments.accelerator_config.dispatch_batches is False
    with pytest.raises(ValueError, match="dispatch_batches=True"):
        type(arguments)(str(tmp_path), use_cpu=True, bf16=False, accelerator_config={"dispatch_batches": True})


if __name__ == "__main__":
    main(sys.argv[1])
    leave()
