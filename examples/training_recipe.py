"""What the training scripts share: arguments from a YAML file and the command line, data, and the run itself."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from datasets import IterableDataset
from transformers import Trainer, TrainingArguments
from trl import TrlParser

from transformers_puma.training.data import STAGES, build_training_data


@dataclass
class DataArguments:
    """Arguments of `build_training_data`."""

    stage: str = field(metadata={"help": "the stage whose rows are made of the samples: " + ", ".join(STAGES)})
    sources: list[dict] = field(
        metadata={"help": "in the YAML file: a list of {name, path, weight, and the source's own options}"}
    )
    data_root: str = field(default=".", metadata={"help": "folder that the paths of the sources start from"})
    image_size: int | None = field(default=None, metadata={"help": "side in pixels that pictures are resized to"})
    shuffle_buffer: int = field(default=1000, metadata={"help": "samples held to draw from; 0 keeps the files' order"})
    max_broken_share: float = field(
        default=0.05, metadata={"help": "a larger share of broken samples of a source stops the run"}
    )

    def load(self, arguments: TrainingArguments) -> IterableDataset:
        """The stream, in enough parts for every process and each of its workers."""
        return build_training_data(
            [source | self._below_root(source) for source in self.sources],
            self.stage,
            seed=arguments.seed,
            image_size=self.image_size,
            shuffle_buffer=self.shuffle_buffer,
            num_shards=arguments.world_size * max(arguments.dataloader_num_workers, 1),
            max_broken_share=self.max_broken_share,
        )

    def _below_root(self, source: dict) -> dict:
        """The options of a source that are paths."""
        found = {}
        for name in ("path", "images"):
            if name in source:
                paths = source[name] if isinstance(source[name], list) else [source[name]]
                below = [str(Path(self.data_root, path)) for path in paths]
                found[name] = below if isinstance(source[name], list) else below[0]
        return found


def parse_recipe(types: tuple[type, ...], argv: list[str] | None = None) -> tuple:
    """An instance of each dataclass: `CONFIG.yaml [--name value ..]`; the command line wins over the file."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv.insert(0, "--config")
    return TrlParser(types).parse_args_and_config(argv)


def run(trainer: Trainer) -> None:
    """Trains, going on from the last whole checkpoint, saves, and tells the first and the last logged loss."""
    result = trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    trainer.save_state()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metrics = {**result.metrics, "first_loss": float(losses[0]), "last_loss": float(losses[-1])}
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
