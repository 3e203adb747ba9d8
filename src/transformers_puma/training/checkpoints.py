"""Checkpoints that survive a kill, a full disk and a loss that is no number, for every trainer of PUMA.

`transformers.Trainer` writes a checkpoint file by file into its final folder, and resumes from the folder of the
highest step whether or not all of it is there. Here a checkpoint counts only once its manifest lists every file with
its size. The manifest is written last, after all processes are done and before any older checkpoint is deleted.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, TrainOutput, rotate_checkpoints
from transformers.utils import is_datasets_available

if is_datasets_available():
    from datasets import IterableDataset

logger = logging.getLogger(__name__)

MANIFEST_NAME = "checkpoint_manifest.json"
EPOCH_STRATEGIES = ("eval_strategy", "save_strategy", "logging_strategy")


def write_manifest(checkpoint: str | Path) -> None:
    """Declares the files that are now in the folder `checkpoint` to be all of it; in one rename."""
    checkpoint = Path(checkpoint)
    partial = checkpoint / f"{MANIFEST_NAME}.partial"
    own = (partial, checkpoint / MANIFEST_NAME)
    paths = [path for path in checkpoint.rglob("*") if path.is_file() and path not in own]
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in sorted(paths)}
    partial.write_text(json.dumps(sizes, indent=1))
    os.replace(partial, checkpoint / MANIFEST_NAME)


def missing_files(checkpoint: str | Path) -> list[str]:
    """Names of the files that `checkpoint` lacks, or has with another size than its manifest says; [] if it is whole.

    Without a manifest that is the manifest.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / MANIFEST_NAME).is_file():
        return [MANIFEST_NAME]
    sizes = json.loads((checkpoint / MANIFEST_NAME).read_text())
    found = {name: checkpoint / name for name in sizes if (checkpoint / name).is_file()}
    return [name for name, size in sizes.items() if name not in found or found[name].stat().st_size != size]


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """Path of the checkpoint of the highest step in `folder` that is whole; None if there is none."""
    steps = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdigit() and path.is_dir():
            steps[int(step)] = path
    for step in sorted(steps, reverse=True):
        missing = missing_files(steps[step])
        if not missing:
            return str(steps[step])
        logger.warning("%s is not whole and left aside: %s is missing or cut short", steps[step], missing[0])
    return None


class _WholeStream(torch.utils.data.IterableDataset):
    """A stream whose files accelerate does not deal out to the processes."""

    def __init__(self, stream: Iterable[dict]):
        self.stream = stream
        self.num_rows = 0  # that were read so far; stays 0 where workers read

    def __iter__(self) -> Iterator[dict]:
        self.num_rows = 0
        for row in self.stream:
            self.num_rows += 1
            yield row


class ResumableTrainerMixin(Trainer):
    """Stands before the stock trainer, of transformers or TRL, among the bases of a trainer of PUMA.

    - `train(resume_from_checkpoint=True)` goes on from the last whole checkpoint, or starts where there is none: the
      same command starts a run and, after a kill at any moment, continues it to the same losses.
    - A checkpoint that cannot be written stops the run, and so does a loss that is not finite. The error names the
      last whole checkpoint. Weights that are not finite are never saved.
    - A stream (`datasets.IterableDataset`) starts anew where it ends, in the same order.
    - With `push_to_hub`, what is pushed at a checkpoint loads as it is, and the checkpoint is whole.

    Raises:
        ValueError: one process sees several GPUs, the processes of a launcher are not joined, or something is to be
            done at the end of the epochs of a stream.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.args.n_gpu} GPUs, and {type(self).__name__} does not support "
                "torch.nn.DataParallel: start one process for each with torchrun or accelerate launch, or set "
                "CUDA_VISIBLE_DEVICES to one"
            )
        num_started = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
        if num_started != self.args.world_size:
            raise ValueError(
                f"{num_started} processes were started, but each would train alone: no accelerator joins "
                "them; use_cpu=True joins them on the CPU"
            )
        by_epoch = [name for name in EPOCH_STRATEGIES if getattr(self.args, name) == "epoch"]
        if by_epoch and is_datasets_available() and isinstance(self.train_dataset, IterableDataset):
            raise ValueError(f"{by_epoch[0]}='epoch', but a stream has no end here: expected 'steps' or 'no'")
        self._eval_stream: _WholeStream | None = None

    def get_train_dataloader(self) -> DataLoader:
        """The stock loop takes up the next epoch where a stream ends. But processes have shares of different length,
        and would wait for each other there; and a resumed run would not know how many epochs to skip."""
        once = self.train_dataset
        if is_datasets_available() and isinstance(once, IterableDataset):
            self.train_dataset = once.repeat(None)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = once

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        self._eval_stream = self._whole_stream(self.eval_dataset[data] if isinstance(data, str) else data)
        return super().get_eval_dataloader(self._eval_stream or eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        self._eval_stream = self._whole_stream(test_dataset)
        return super().get_test_dataloader(self._eval_stream or test_dataset)

    def _whole_stream(self, data: Any) -> _WholeStream | None:
        """Of a stream each process reads its part of every global batch, the last filled up from the start: shares of
        different length would leave the others waiting. None for other data, and for one process."""
        if self.args.world_size > 1 and isinstance(data, torch.utils.data.IterableDataset):
            return _WholeStream(data)
        return None

    def _num_own_rows(self) -> int | None:
        """How many rows of this process's last batch of an evaluation don't only fill it up, which all processes have
        in the order of the data; 0 or less for none. None for other batches."""
        gradient_state = self.accelerator.gradient_state
        if not gradient_state.end_of_dataloader:
            return None
        num_left = gradient_state.remainder
        if self._eval_stream is not None:  # whose length is known at its end
            num_left = self._eval_stream.num_rows % (self.args.eval_batch_size * self.args.world_size)
        return num_left - self.args.process_index * self.args.eval_batch_size if num_left > 0 else None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `transformers.Trainer`, but True is no error where there is no checkpoint yet.

        Raises:
            ValueError: True although `save_only_model` keeps nothing to resume from, or a path to a checkpoint that
                its manifest shows to be cut short.
        """
        if resume_from_checkpoint is True:
            if self.args.save_only_model:
                raise ValueError("resume_from_checkpoint=True needs save_only_model=False: the optimizer is not saved")
            # One answer for all processes, even if a node does not see the folder: it then fails instead of diverging.
            choice = [last_whole_checkpoint(self.args.output_dir)]
            resume_from_checkpoint = broadcast_object_list(choice)[0]
            logger.info("resuming from %s", resume_from_checkpoint or "nothing: a fresh start")
        elif resume_from_checkpoint and Path(resume_from_checkpoint, MANIFEST_NAME).is_file():
            missing = missing_files(resume_from_checkpoint)
            if missing:
                raise ValueError(f"{resume_from_checkpoint} is not whole: {missing} missing or cut short")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *args: Any
    ) -> tuple[int, int]:
        epochs_trained, steps_trained_in_current_epoch = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, *args
        )
        # The stock loop looks whether it is done after a step, and would train one more than an unbroken run.
        if self.state.global_step >= max_steps:
            epochs_trained = num_train_epochs
        return epochs_trained, steps_trained_in_current_epoch

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss).all():
            raise FloatingPointError(f"the loss of step {self.state.global_step + 1} is {loss}. {self._way_on()}")
        return loss

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # Losses not yet logged are in no checkpoint: without this the first loss that a resumed run logs would be the
        # mean of fewer steps than in an unbroken one.
        self.control.should_log |= self.control.should_save and self.args.logging_strategy != IntervalStrategy.NO
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self._check_weights()
        if self.args.should_save and checkpoint.exists():  # cut short by a kill, or of a run that went another way
            shutil.rmtree(checkpoint)
        self.accelerator.wait_for_everyone()
        try:
            with self._no_rotation():
                super()._save_checkpoint(model, trial)
            if not self.args.push_to_hub:  # else it was done before the push
                self._complete(checkpoint)
        # torch reports a failed write as a RuntimeError, safetensors as its own error.
        except (OSError, RuntimeError, SafetensorError) as error:
            folder = next(path for path in checkpoint.absolute().parents if path.exists())
            free = shutil.disk_usage(folder).free / 2**20
            if self.args.should_save:
                shutil.rmtree(checkpoint, ignore_errors=True)
            raise OSError(
                f"{checkpoint} could not be written, with {free:.0f} MiB free on its disk: {error}. {self._way_on()}"
            ) from error
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(checkpoint.parent),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    @contextmanager
    def _no_rotation(self) -> Iterator[None]:
        """The stock method deletes older checkpoints at its end, when this one does not have its manifest yet."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._complete(checkpoint_folder)
        if self.args.should_save:  # the stock method takes the weights along, not the code that reads them
            for file in Path(checkpoint_folder).glob("*.py"):
                shutil.copy(file, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _complete(self, checkpoint: str | Path) -> None:
        """Once all processes have written their files of a checkpoint."""
        self.accelerator.wait_for_everyone()
        if self.args.should_save and not self.args.save_only_model:
            write_manifest(checkpoint)

    def _check_weights(self) -> None:
        """A finite loss can have gradients that are not, and the step after which a checkpoint is due apply them."""
        # Under ZeRO-3 each process sees its part of a parameter only: what one finds, all must know.
        own = {
            name: getattr(parameter, "ds_tensor", parameter)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        broken = gather_object([name for name, weight in own.items() if not torch.isfinite(weight).all()])
        if broken:
            raise FloatingPointError(
                f"{broken[0]} is not finite after step {self.state.global_step}: not saved. {self._way_on()}"
            )

    def _way_on(self) -> str:
        checkpoint = last_whole_checkpoint(self.args.output_dir)
        if checkpoint is None:
            return "There is no whole checkpoint."
        return f"The last whole checkpoint is {checkpoint}; resume_from_checkpoint=True goes on from it."
