"""Which model a command is about, and what is in it, without loading or downloading any weight."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from puma_files import read_json

from .errors import UserError, one_line
from .options import NUM_SCALES, Scale

CHECKOUT_MODEL = Path("hub_configs", "puma-emoji")
PIPELINE_INDEX, CONFIG = "model_index.json", "config.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class ModelSource:
    """A model folder, or the id of a model on the Hub.

    name: the folder's path or the id; goes into `from_pretrained`.
    """

    name: str

    @cached_property
    def index(self) -> dict[str, Any]:
        """`model_index.json`, empty without a pipeline."""
        return self._read(PIPELINE_INDEX)

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json` of the root, empty if there is none."""
        return self._read(CONFIG)

    @property
    def components(self) -> list[str]:
        """Names of the pipeline's parts that are there, such as `unet_3`."""
        return [
            name
            for name, value in self.index.items()
            if not name.startswith("_") and isinstance(value, list) and value[0] is not None
        ]

    @property
    def decoders(self) -> list[int]:
        """Scales whose decoder is there, finest first."""
        return [scale for scale in range(NUM_SCALES) if f"unet_{scale}" in self.components]

    def require_decoders(self) -> None:
        if self.config.get("_class_name") == "PumaUNet2DConditionModel":
            raise UserError(f"{self.name} is a single decoder; a picture needs a pipeline, with its VAE and scheduler")
        if not self.decoders:
            raise UserError(f"{self.name} has no decoders (no unet_0 .. unet_{NUM_SCALES - 1} in a {PIPELINE_INDEX})")

    def require_scale(self, scale: Scale | None) -> None:
        """Raises `UserError` if one scale or a schedule is asked for and a decoder is absent."""
        wanted = [scale] if isinstance(scale, int) else [s for _, s in scale] if isinstance(scale, list) else []
        for absent in (s for s in wanted if s not in self.decoders):
            there = ", ".join(map(str, self.decoders))
            raise UserError(f"{self.name} has no decoder for scale {absent}, only for {there}")

    def require_language_model(self, what: str) -> None:
        """Raises `UserError` unless the transformers library finds PUMA's language model here."""
        if self.config.get("model_type") != "puma":
            raise UserError(f"{what} needs a language model, and {self.name} has none")

    def require_encoder(self) -> None:
        if "mllm" not in self.components and "image_encoder" not in self.components:
            raise UserError(f"a picture needs an image encoder, and {self.name} has none")

    def require_weights(self, parts: list[str]) -> None:
        """Raises `UserError` if a local folder has the configuration of one of these parts alone, as puma-8b does."""
        for part in parts:
            folder = Path(self.name, part)
            if folder.is_dir() and not any(folder.glob("*.safetensors")):
                raise UserError(f"{folder} holds no weights (*.safetensors)")

    def _read(self, file: str) -> dict[str, Any]:
        path = Path(self.name, file) if Path(self.name).is_dir() else _download(self.name, file)
        return {} if path is None or not path.is_file() else read_json(path)


def find_model(name: str | None) -> ModelSource:
    """The model that `--model` names, or the checkout's.

    Raises:
        UserError: neither a folder nor the id of a model on the Hub; or no `--model` outside of a checkout.
    """
    if name is None:
        folder = checkout_model()
        if folder is None:
            raise UserError(f"--model is required: this is no checkout of the project with {CHECKOUT_MODEL} in it")
        return ModelSource(str(folder))
    folder = Path(name).expanduser()
    if folder.is_dir():
        source = ModelSource(str(folder))
        if not source.index and not source.config:
            raise UserError(f"{folder} is not a model folder: it has neither {PIPELINE_INDEX} nor {CONFIG}")
        return source
    if folder.exists():
        raise UserError(f"{folder} is a file; a model is a folder, or a name on the Hub")
    if not HUB_ID.fullmatch(name) or folder.parent.is_dir():
        raise UserError(f"no such model folder: {folder}")
    source = ModelSource(name)
    if not source.index and not source.config:
        raise UserError(f"{name} on the Hub is not a model: it has neither {PIPELINE_INDEX} nor {CONFIG}")
    return source


def checkout_model() -> Path | None:
    """The small ready model of the checkout that the working directory is in, or else that this program runs from."""
    here = Path.cwd()
    for root in (here, *here.parents, Path(__file__).resolve().parents[2]):
        folder = root / CHECKOUT_MODEL
        if (folder / PIPELINE_INDEX).is_file():
            return folder
    return None


def _download(name: str, file: str) -> Path | None:
    """A file of a model on the Hub, None if the model has no such file."""
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file))
    except RemoteEntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        # Without a network the cache knows of the files that were not there when it could be reached.
        is_offline = isinstance(error, LocalEntryNotFoundError)
        if is_offline and try_to_load_from_cache(name, file) is _CACHED_NO_EXIST:
            return None
        raise UserError(f"there is no folder {name}, and no such model from the Hub: {one_line(error)}") from error
