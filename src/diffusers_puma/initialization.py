"""A trainable model folder from a language model, an encoder and decoders (`puma init`). Trains nothing.

The language model's part is put together by `transformers_puma.assembly`; here the decoders join it. They come from
the release, from a saved `PumaPipeline`, or from a plain pipeline such as Stable Diffusion XL, whose UNet then starts
the decoder of every scale (report section 3.2). One decoder at a time is in memory.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler
from diffusers.utils import CONFIG_NAME, logging
from huggingface_hub import snapshot_download
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from puma_files import read_json
from transformers_puma import PumaForConditionalGeneration, PumaImageProcessor, PumaProcessor
from transformers_puma.assembly import (
    assemble_puma,
    load_encoder,
    load_language_model,
    require_encoder,
    require_language_model,
)
from transformers_puma.granularity import encoder_tokens_per_scale

from .conversion import (
    DECODERS,
    IMAGE_ENCODER,
    TOKEN_COUNTS,
    UNUSED,
    convert_released_decoders,
    empty_decoder,
    load_weights,
    read_vae,
    read_weights,
    require_components,
    require_release,
)
from .folders import new_folder
from .pipeline_puma import PumaPipeline
from .unet_puma import PumaUNet2DConditionModel, initial_position_table

PIPELINE_INDEX = "model_index.json"
RELEASE, PUMA, PLAIN = "release", "puma", "plain"
PLAIN_PARTS = ("unet", "vae", "scheduler")
# Of a source on the Hub: not its language model, nor weights that are there once more in another format.
HUB_FILES = [
    PIPELINE_INDEX,
    f"{IMAGE_ENCODER}/*",
    *(f"{DECODERS}/{part}/*" for part in ("unet_*", "vae", "scheduler")),
]
HUB_FILES += [
    f"{folder}/{file}"
    for folder in ("unet", "unet_[0-4]", "vae", "scheduler", "image_encoder")
    for file in ("*.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*", "model*.safetensors")
]

Components = dict[str, Any]

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Part:
    """One part of a model folder: what it is made of, and what is left to do."""

    name: str
    num_parameters: int
    source: str
    state: str


@dataclass(frozen=True)
class InitializationReport:
    """What `initialize_puma` made; as a string, a table for people."""

    folder: Path
    parts: list[Part]
    notes: list[str]

    def __str__(self) -> str:
        rows = [("part", "parameters", "from", "state")]
        rows += [(part.name, _format_count(part.num_parameters), part.source, part.state) for part in self.parts]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        table = [
            f"{name:<{widths[0]}}  {count:>{widths[1]}}  {source:<{widths[2]}}  {state}"
            for name, count, source, state in rows
        ]
        trainers = "PumaTrainer trains what says so, PumaDecoderTrainer one decoder; the rest stays as it is."
        return "\n".join([f"{self.folder} is ready for training:", *table, trainers, *self.notes])


def initialize_puma(
    llm: str | Path, vision: str | Path, decoders: str | Path | None = None, out: str | Path = "puma-8b"
) -> InitializationReport:
    """Assembles a trainable model folder.

    What is new in it starts at random, drawn from torch's global generator: the projector, the image head, the rows of
    PUMA's tokens, and with plain decoders their feature projections.

    Args:
        llm: folder or Hub id of a decoder-only language model.
        vision: folder or Hub id of a CLIP encoder, or `open_clip:ARCH/TAG`; see `load_encoder`.
        decoders: folder or Hub id of the released decoders, of a saved `PumaPipeline`, or of a plain latent diffusion
            pipeline with `unet`, `vae` and `scheduler`. None makes the folder of a language model alone.
        out: the folder to make; it may exist if it is empty. It appears only once it is complete.

    Raises:
        FileExistsError: `out` holds something.
        ValueError, OSError: a source that is missing, incomplete or of another kind; parts that don't fit each other.
    """
    llm, vision, out = str(llm), str(vision), Path(out)
    with new_folder(out) as work:
        require_encoder(vision)
        require_language_model(llm)
        source = None if decoders is None else _DecoderSource.find(str(decoders))
        encoder, image_processor = load_encoder(vision)
        if source is not None:
            _require_fit(source, encoder)
        model, processor, parts, notes = _assemble_language_model(llm, vision, encoder, image_processor)
        if source is None:
            model.save_pretrained(work)
            processor.save_pretrained(work)
            return InitializationReport(out, parts, notes)

        model.save_pretrained(work / "mllm")
        logger.info("the language model is in place")
        processor.save_pretrained(work / "processor")
        state = _state_of_decoders(source, model.model.vision_tower)
        model.to("meta")
        components = _write_decoders(source, model, work)
        steps = source.index.get("default_num_inference_steps", 50)
        pipeline = PumaPipeline(mllm=model, processor=processor, **components, default_num_inference_steps=steps)
        pipeline.save_config(work)
        parts += [
            Part(name, _count(module), source.name, state if name.startswith("unet") else "pretrained, frozen")
            for name, module in components.items()
            if isinstance(module, nn.Module)
        ]
    return InitializationReport(out, parts, notes)


def _assemble_language_model(
    llm: str, vision: str, encoder: CLIPVisionModel, image_processor: PumaImageProcessor
) -> tuple[PumaForConditionalGeneration, PumaProcessor, list[Part], list[str]]:
    language_model, tokenizer = load_language_model(llm)
    encoder_dtype, old_rows, old_tokens = encoder.dtype, _rows(language_model), len(tokenizer)
    model, processor = assemble_puma(language_model, tokenizer, encoder, image_processor)

    dtype = str(model.dtype).removeprefix("torch.")
    backbone = _count(model) - sum(map(_count, (model.model.vision_tower, model.model.projector, model.image_head)))
    new_rows = _rows(model) - old_rows
    new_parameters = new_rows * (1 if model.config.tie_word_embeddings else 2) * model.config.text_config.hidden_size
    new_tokens = f"{len(tokenizer) - old_tokens} new tokens in {new_rows} new rows"
    kind = f"{llm} ({model.config.text_config.model_type}, {dtype})"
    parts = [
        Part("language model", backbone - new_parameters, kind, "pretrained, trained by default"),
        Part("token rows", new_parameters, new_tokens, "new, trained by default"),
        Part("projector", _count(model.model.projector), "random", "new, trained by default"),
        Part("image head", _count(model.image_head), "random", "new, trained by default"),
        Part("encoder", _count(model.model.vision_tower), vision, "pretrained, frozen"),
    ]
    notes = []
    if encoder_dtype != model.dtype:
        notes.append(f"The encoder was {str(encoder_dtype).removeprefix('torch.')} and is {dtype} now.")
    return model, processor, parts, notes


@dataclass(frozen=True)
class _DecoderSource:
    """Where decoders come from: `kind` of layout in a local `folder`; `index` is its `model_index.json`, if any."""

    name: str
    folder: Path
    kind: str
    index: Mapping[str, Any]

    @property
    def encoder(self) -> Path | None:
        """The model that holds the encoder which the decoders were trained with, if it is there."""
        folder = self.folder / (IMAGE_ENCODER if self.kind == RELEASE else "image_encoder")
        if folder.is_dir():
            return folder
        return self.folder if any((self.folder / "mllm").glob("*.safetensors")) else None

    @classmethod
    def find(cls, name: str) -> "_DecoderSource":
        """Raises `ValueError` or `OSError` unless decoders and VAE are there, with whole weights."""
        folder = Path(name)
        if not folder.is_dir():
            folder = _download(name)
        if (folder / DECODERS).is_dir():
            require_release(folder)
            return cls(name, folder, RELEASE, {})
        file = folder / PIPELINE_INDEX
        index = read_json(file) if file.is_file() else {}
        if index.get("_class_name") == "PumaPipeline":
            require_components(folder, _component_classes(index))
            source = cls(name, folder, PUMA, index)
            if source.encoder is not None:
                require_encoder(str(source.encoder))
            return source
        if all((folder / part).is_dir() for part in PLAIN_PARTS):
            require_components(folder, PLAIN_PARTS)
            return cls(name, folder, PLAIN, index)
        raise ValueError(
            f"{name} holds no decoders: expected {DECODERS} as in the release, a saved PumaPipeline, or the folders "
            "unet, vae and scheduler of a plain pipeline"
        )


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{name} is no folder, and cannot be downloaded from the Hub: {reason}") from error


def _require_fit(source: _DecoderSource, encoder: CLIPVisionModel) -> None:
    """Raises `ValueError`, before anything is written, if decoders take other features than the encoder gives."""
    gives = [(count, encoder.config.hidden_size) for count in encoder_tokens_per_scale(encoder.config)]
    takes: dict[int, tuple[int, int]] = {}
    if source.kind == RELEASE:
        channels = CLIPVisionConfig.from_pretrained(source.folder / IMAGE_ENCODER).hidden_size
        takes = {scale: (count, channels) for scale, count in enumerate(TOKEN_COUNTS)}
    elif source.kind == PUMA:
        for name in _component_classes(source.index):
            if name.startswith("unet_"):
                file = source.folder / name / CONFIG_NAME
                decoder = read_json(file)
                if not {"num_tokens", "encoder_hid_dim"} <= decoder.keys():
                    raise ValueError(f"{file} describes no decoder of PUMA: it needs num_tokens and encoder_hid_dim")
                takes[int(name.removeprefix("unet_"))] = decoder["num_tokens"], decoder["encoder_hid_dim"]
    for scale, taken in takes.items():
        given = gives[scale] if scale < len(gives) else None
        if taken != given:
            has = f"{given[0]} tokens of {given[1]} channels" if given else "nothing"
            raise ValueError(
                f"the decoder of scale {scale} in {source.name} takes {taken[0]} tokens of {taken[1]} channels, but "
                f"the encoder gives {has} at that scale"
            )


def _state_of_decoders(source: _DecoderSource, encoder: CLIPVisionModel) -> str:
    """What is left to do with the decoders, given the encoder that they are to follow."""
    if source.kind == PLAIN:
        return "plain UNet with a new feature projection, must be trained"
    if source.encoder is None:
        return "pretrained, for the encoder that it was trained with"
    weights = load_encoder(str(source.encoder))[0].state_dict()
    # Either may have been rounded to half precision since.
    is_same = all(
        name in weights
        and weights[name].shape == weight.shape
        and torch.allclose(weight.float(), weights[name].float(), rtol=1e-2, atol=1e-3)
        for name, weight in encoder.state_dict().items()
    )
    return "pretrained for this encoder" if is_same else "pretrained for another encoder, must be trained again"


def _write_decoders(source: _DecoderSource, model: PumaForConditionalGeneration, work: Path) -> Components:
    """Decoders, VAE and scheduler as folders in `work`; returned without weights, on the meta device."""
    if source.kind == PLAIN:
        return _write_plain_decoders(source, model, work)
    folder, index, move = source.folder, source.index, shutil.copytree
    if source.kind == RELEASE:
        folder, move = work.parent / "converted", shutil.move
        convert_released_decoders(source.folder, folder)
        index = read_json(folder / PIPELINE_INDEX)

    components: Components = {}
    for name, class_name in _component_classes(index).items():
        move(folder / name, work / name)
        component_class = PumaUNet2DConditionModel if name.startswith("unet") else getattr(diffusers, class_name)
        with torch.device("cpu" if name == "scheduler" else "meta"):
            components[name] = component_class.from_config(component_class.load_config(work / name))
        logger.info(f"{name} is in place")
    return components


def _component_classes(index: Mapping[str, Any]) -> dict[str, str]:
    """The class names of the VAE, the scheduler and each decoder that a pipeline's index says it has."""
    names = [name for name in index if name.startswith("unet_") or name in ("vae", "scheduler")]
    return {name: index[name][1] for name in names if index[name][1] is not None}


def _write_plain_decoders(source: _DecoderSource, model: PumaForConditionalGeneration, work: Path) -> Components:
    vae = read_vae(source.folder / "vae")
    vae.save_pretrained(work / "vae")
    # As the release is read, and as decoders are trained.
    scheduler = DDPMScheduler.from_pretrained(source.folder / "scheduler")
    scheduler.save_pretrained(work / "scheduler")
    components: Components = {"vae": vae.to("meta"), "scheduler": scheduler}

    folder = source.folder / "unet"
    config = read_json(folder / CONFIG_NAME)
    if config.get("in_channels", 4) != vae.config.latent_channels:
        raise ValueError(
            f"the UNet of {source.name} takes {config.get('in_channels', 4)} channels, but the VAE's latents have "
            f"{vae.config.latent_channels}: expected a text-to-image pipeline"
        )
    weights = {name: w for name, w in read_weights(folder).items() if not name.startswith(UNUSED)}
    feature_size = model.config.vision_config.hidden_size
    for scale, num_tokens in enumerate(model.config.tokens_per_scale):
        decoder = empty_decoder(folder, feature_size, num_tokens, use_position_table=scale == 0)
        _fill_from_plain(folder, decoder, weights)
        decoder.save_pretrained(work / f"unet_{scale}")
        components[f"unet_{scale}"] = decoder.to("meta")
        logger.info(f"unet_{scale} is in place")
    return components


def _fill_from_plain(folder: Path, decoder: PumaUNet2DConditionModel, weights: dict[str, torch.Tensor]) -> None:
    """Gives a decoder the plain UNet's weights, shared, and a projection and a position table that are new."""
    projection = decoder.encoder_hid_proj.to_empty(device="cpu")
    projection.reset_parameters()
    new = {f"encoder_hid_proj.{name}": weight for name, weight in projection.state_dict().items()}
    if decoder.config.use_position_table:
        new["position_table"] = initial_position_table(decoder.config.num_tokens, projection.out_features)
    dtype = weights["conv_in.weight"].dtype
    new = {name: weight.to(dtype) for name, weight in new.items()}
    load_weights(folder, decoder, weights | new)


def _rows(model: nn.Module) -> int:
    return model.get_input_embeddings().num_embeddings


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _format_count(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
