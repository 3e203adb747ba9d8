"""What the training scripts share: arguments from a YAML file and the command line, data, and the run itself."""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import IterableDataset
from PIL import Image
from transformers import Trainer, TrainingArguments
from trl import TrlParser

from diffusers_puma import PumaPipeline
from transformers_puma.training import PumaSampleCallback, PumaTrainer
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
    validation_sources: list[dict] | None = field(
        default=None,
        metadata={"help": "as sources: what is evaluated and sampled, for an eval_strategy; None: nothing"},
    )
    validation_samples: int = field(
        default=8, metadata={"help": "rows of the validation set, the first of its sources: always the same"}
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

    def load_validation(self, arguments: TrainingArguments) -> list[dict] | None:
        """Rows of the stage, held in memory."""
        if self.validation_sources is None:
            return None
        sources = [source | self._below_root(source) for source in self.validation_sources]
        rows = build_training_data(
            sources, self.stage, seed=arguments.seed, image_size=self.image_size, shuffle_buffer=0
        )
        return list(itertools.islice(rows, self.validation_samples))

    def _below_root(self, source: dict) -> dict:
        """The options of a source that are paths."""
        found = {}
        for name in ("path", "images"):
            if name in source:
                paths = source[name] if isinstance(source[name], list) else [source[name]]
                below = [str(Path(self.data_root, path)) for path in paths]
                found[name] = below if isinstance(source[name], list) else below[0]
        return found


@dataclass
class SampleArguments:
    """How the language model's samples of the validation set are drawn, see `PumaSampleCallback`."""

    sample_decoders: str | None = field(
        default=None,
        metadata={"help": "folder or Hub id with decoders; None: samples of texts, and errors of features"},
    )
    sample_scale: int = field(default=3, metadata={"help": "0 (finest) to 4, of what is drawn"})

    def add_to(self, trainer: PumaTrainer) -> None:
        if trainer.eval_dataset is not None and shows_samples(trainer.args):
            rows, decode = trainer.eval_dataset, self._decoder(trainer) if self.sample_decoders else None
            trainer.add_callback(PumaSampleCallback(trainer, rows, decode=decode, scale=self.sample_scale))

    def _decoder(self, trainer: PumaTrainer) -> Callable[[dict[int, torch.Tensor]], Image.Image]:
        scale = self.sample_scale
        without = dict.fromkeys(("mllm", "processor", "image_encoder"))
        pipe = PumaPipeline.from_pretrained(self.sample_decoders, scales=[scale], dtype=torch.float32, **without)
        pipe.to(trainer.args.device).set_progress_bar_config(disable=True)
        black = trainer.processing_class.image_processor(Image.new("RGB", (1, 1)), return_tensors="pt")
        black = black["pixel_values"].to(trainer.args.device)

        def decode(features: dict[int, torch.Tensor]) -> Image.Image:
            given, nothing = features[scale].float(), trainer.model.encode_image(black)[scale].float()
            options = {"scale": scale, "generator": torch.Generator().manual_seed(trainer.args.seed)}
            return pipe(image_features={scale: given}, negative_image_features={scale: nothing}, **options).images[0]

        return decode


def shows_samples(arguments: TrainingArguments) -> bool:
    """Whether a tracker is on that shows pictures and texts."""
    return bool({"tensorboard", "wandb"} & set(arguments.report_to))


def parse_recipe(types: tuple[type, ...], argv: list[str] | None = None) -> tuple:
    """An instance of each dataclass: `CONFIG.yaml [--name value ..]`; the command line wins over the file."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv.insert(0, "--config")
    return TrlParser(types).parse_args_and_config(argv)


def run(trainer: Trainer) -> None:
    """Trains, going on from the last whole checkpoint, saves, and tells the first and the last loss: of training steps
    as logged, and of the validation set."""
    result = trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    trainer.save_state()
    metrics = dict(result.metrics)
    for name in ("loss", "eval_loss"):
        losses = [float(entry[name]) for entry in trainer.state.log_history if name in entry]
        if losses:
            metrics |= {f"first_{name}": losses[0], f"last_{name}": losses[-1]}
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
