"""Loads a model for a command: quietly, but not if weights are missing. Imports the libraries."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from transformers import AutoModelForMultimodalLM, AutoProcessor

from transformers_puma import PumaForConditionalGeneration, PumaProcessor

from .errors import UserError, one_line
from .model_source import ModelSource

if TYPE_CHECKING:
    from diffusers_puma import PumaPipeline

LIBRARIES = ("transformers", "diffusers", "huggingface_hub")
# Both libraries fill weights that a folder lacks with random numbers and only warn of it: transformers in a table with
# a line for each, diffusers in a list.
UNFIT = re.compile(r"^(\S+) *\| *(?:MISSING|MISMATCH)|newly initialized[^\[]*\['([^']+)'", re.MULTILINE)


def choose_device(device: str | None) -> str:
    """`device`, by default the GPU if there is one.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU that torch can use")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(dtype: str | None, device: str) -> torch.dtype:
    """The format by its name; by default fp32 on the CPU, and on a GPU fp16, in which the report trained."""
    return getattr(torch, dtype or ("float32" if device == "cpu" else "float16"))


def load_pipeline(
    model: ModelSource, scales: list[int], device: str | None = None, dtype: str | None = None
) -> "PumaPipeline":
    """The model's pipeline with the decoders of `scales` only.

    Raises:
        UserError: no such device, weights that are missing or unreadable.
        ValueError, OSError: of the libraries, for a folder that they cannot read.
    """
    from diffusers_puma import PumaPipeline  # seconds, which a command without decoders does not need

    device = choose_device(device)
    parts = {"mllm", "image_encoder", "vae", *(f"unet_{scale}" for scale in scales)}
    model.require_weights([part for part in model.components if part in parts])
    with _loading(model):
        # Without `use_safetensors` diffusers falls back to pickled weights.
        pipe = PumaPipeline.from_pretrained(
            model.name, scales=scales, dtype=choose_dtype(dtype, device), use_safetensors=True
        )
        return pipe.to(device)


def load_language_model(
    model: ModelSource, device: str | None = None, dtype: str | None = None
) -> tuple[PumaForConditionalGeneration, PumaProcessor]:
    """The model's language model and processor, without any decoder. Raises as `load_pipeline`."""
    device = choose_device(device)
    model.require_weights(["mllm" if "mllm" in model.components else "."])
    with _loading(model):
        mllm = AutoModelForMultimodalLM.from_pretrained(
            model.name, dtype=choose_dtype(dtype, device), use_safetensors=True
        )
        return mllm.to(device), AutoProcessor.from_pretrained(model.name)


@contextmanager
def _loading(model: ModelSource) -> Iterator[None]:
    """Keeps the libraries' reports away, except those of errors; raises if they tell of weights that were made up."""
    with quiet_libraries() as warnings:
        try:
            yield
        except SafetensorError as error:
            raise UserError(f"the weights of {model.name} cannot be read: {one_line(error)}") from error
        finally:
            # Also before an error of transformers that refers to the report in its warning.
            unfit = [match[1] or match[2] for warning in warnings for match in UNFIT.finditer(warning)]
            if unfit:
                raise UserError(
                    f"the weights of {model.name} do not fit its configuration: {len(unfit)} missing or of another "
                    f"shape, such as {unfit[0]}"
                )


@contextmanager
def quiet_libraries() -> Iterator[list[str]]:
    """Collects what transformers, diffusers and the Hub's client warn of, in place of printing it.

    Errors are printed as ever. Yields the list that warnings are added to.
    """
    warnings: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.ERROR:
                logging.lastResort.handle(record)
            else:
                warnings.append(record.getMessage())

    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate, logger.level = [Collector()], False, logging.WARNING
    try:
        yield warnings
    finally:
        for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate, logger.level = handlers, propagate, level
