"""The decoders that PUMA's authors released, turned into a saved `PumaPipeline`.

The release holds an image encoder and, inside a copy of Stable Diffusion XL, one UNet per scale. Such a UNet is the
stock one plus a Linear in front of the cross-attention (`mapping_layer`) and, at the finest scale, a position table
(`embed_img_pos`), so converting it means two new names, and a config that says what the weights hold.
"""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, logging
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel

from puma_files import read_json, read_safetensors_header, shard_files, unreadable
from transformers_puma.assembly import load_encoder, require_encoder
from transformers_puma.granularity import encoder_tokens_per_scale

from .folders import new_folder
from .pipeline_puma import PumaPipeline
from .unet_puma import PumaUNet2DConditionModel

IMAGE_ENCODER = "ckpts/clip-vit-large-patch14"
DECODERS = "ckpts/stable-diffusion-xl-base-1.0"
TOKEN_COUNTS = (256, 64, 16, 4, 1)  # by scale; the release names a decoder by its token count
RENAMED = {
    "mapping_layer.weight": "encoder_hid_proj.weight",
    "mapping_layer.bias": "encoder_hid_proj.bias",
    "embed_img_pos": "position_table",
}
UNUSED = "add_embedding."  # SDXL's embedding of text and size, which PUMA does not feed
RELEASE_CONFIG_KEYS = ("mapping_dim", "mapping_dim1", "num_tokens", "use_embeds")

logger = logging.get_logger(__name__)


def convert_released_decoders(src: str | Path, dst: str | Path) -> None:
    """Converts a folder in the release's layout (a download of the Hub repository `LucasFang/PUMA`).

    Weights may be safetensors or `.bin`, whole or in shards; nothing is unpickled but tensors. Decoders keep their
    number format and are mapped from their files, not read, but for `.bin` files in torch's form before 1.6. The
    image encoder and the VAE are written in fp32. All parts are checked before the first is written, and `dst` appears
    only once it is complete.

    Args:
        src: the folder that holds `ckpts/`.
        dst: the folder to make; it may exist if it is empty.

    Raises:
        FileExistsError: `dst` holds something.
        FileNotFoundError: a folder or file of the release is missing.
        ValueError: weights that are not what the release's config describes, files that are damaged or that hold more
            than tensors. The message names the file or its folder.
    """
    src, dst = Path(src), Path(dst)
    require_release(src)
    with new_folder(dst) as work:
        components: dict[str, Any] = {
            "image_encoder": _read_image_encoder(src / IMAGE_ENCODER),
            "vae": read_vae(src / DECODERS / "vae"),
            # The release reads whatever its scheduler folder names, SDXL's Euler scheduler too, as DDPM.
            "scheduler": DDPMScheduler.from_pretrained(src / DECODERS / "scheduler"),
        }
        # Mapped, not read: so the last one is known to fit before the first is written.
        decoders = [convert_released_unet(src / DECODERS / f"unet_{count}", count) for count in TOKEN_COUNTS]
        for name, component in components.items():
            component.save_pretrained(work / name)
        for scale, decoder in enumerate(decoders):
            decoder.save_pretrained(work / f"unet_{scale}")
            components[f"unet_{scale}"] = decoder.to("meta")
            logger.info(f"converted the {TOKEN_COUNTS[scale]}-token decoder")
        PumaPipeline(**components).save_config(work)


def require_release(folder: Path) -> None:
    """Raises `FileNotFoundError` or `ValueError` unless all parts of the release are there and whole."""
    decoders = ("vae", "scheduler", *(f"unet_{count}" for count in TOKEN_COUNTS))
    for part in (IMAGE_ENCODER, *(f"{DECODERS}/{name}" for name in decoders)):
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"{folder / part} is missing: the source must be laid out like the release, with ckpts/ in it"
            )
    require_encoder(str(folder / IMAGE_ENCODER))
    require_components(folder / DECODERS, decoders)


def require_components(folder: Path, names: Iterable[str]) -> None:
    """Raises `FileNotFoundError` or `ValueError` unless these folders of diffusers have configs and whole weights."""
    for name in names:
        if name == "scheduler":
            read_json(folder / name / SCHEDULER_CONFIG_NAME)
        else:
            read_json(folder / name / CONFIG_NAME)
            read_weights(folder / name)


def convert_released_unet(folder: str | Path, num_tokens: int) -> PumaUNet2DConditionModel:
    """One released decoder, such as `unet_256`; its weights are mapped from the file.

    Raises:
        FileNotFoundError, ValueError: as `convert_released_decoders`.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_NAME)
    weights = {RENAMED.get(name, name): tensor for name, tensor in read_weights(folder).items()}
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(UNUSED)}
    if "encoder_hid_proj.weight" not in weights:
        raise ValueError(f"{folder} is no PUMA decoder: its weights lack mapping_layer.weight")

    feature_size = weights["encoder_hid_proj.weight"].shape[1]
    has_table = config.get("use_embeds", "position_table" in weights)
    decoder = empty_decoder(folder, feature_size, num_tokens, use_position_table=has_table)
    load_weights(folder, decoder, weights)
    return decoder.eval()


def empty_decoder(
    folder: Path, feature_size: int, num_tokens: int, use_position_table: bool
) -> PumaUNet2DConditionModel:
    """A decoder without weights, on the meta device, of the UNet in `folder`, a plain or a released one.

    Raises:
        ValueError: diffusers makes no UNet of its config; the message names the folder.
    """
    config = {key: value for key, value in read_json(folder / CONFIG_NAME).items() if key not in RELEASE_CONFIG_KEYS}
    changes = {
        "encoder_hid_dim": feature_size,
        "encoder_hid_dim_type": "text_proj",
        "addition_embed_type": None,
        "num_tokens": num_tokens,
        "use_position_table": use_position_table,
    }
    arguments, _, _ = PumaUNet2DConditionModel.extract_init_dict(config | changes)
    try:
        with torch.device("meta"):
            return PumaUNet2DConditionModel(**arguments)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_NAME} describes no UNet: {error}") from error


def read_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """All weights of a folder that diffusers or the release saved, whole or in shards, mapped from its files.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is missing.
        ValueError: a file that was cut off, or a `.bin` file that holds more than tensors.
    """
    weights = {}
    for file in _weight_files(Path(folder)):
        if file.suffix == ".safetensors":
            read_safetensors_header(file)  # names the file in its errors
            weights |= load_file(file)
        else:
            weights |= _load_bin(file)
    return weights


def _weight_files(folder: Path) -> list[Path]:
    for suffix in (".safetensors", ".bin"):
        # The shortest name is the plain one, where there are variants such as `.fp16` next to it.
        indexes = sorted(folder.glob(f"diffusion_pytorch_model*{suffix}.index*.json"), key=lambda file: len(file.name))
        if indexes:
            return shard_files(indexes[0])
        files = sorted(folder.glob(f"diffusion_pytorch_model*{suffix}"), key=lambda file: len(file.name))
        if files:
            return files[:1]
    raise FileNotFoundError(f"{folder} holds no diffusion_pytorch_model.safetensors or .bin, whole or in shards")


def _load_bin(file: Path) -> dict[str, torch.Tensor]:
    try:
        # `weights_only` reads tensors and refuses everything else that a pickle can hold.
        # Only the zip format, torch's own since 1.6, can be mapped.
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except Exception as error:
        raise ValueError(f"{file} cannot be read as a file of tensors: {unreadable(error)}") from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise ValueError(f"{file} must hold a state dict, names with one tensor each")
    return weights


def load_weights(folder: Path, decoder: PumaUNet2DConditionModel, weights: dict[str, torch.Tensor]) -> None:
    """Puts weights, which are not copied, into an empty decoder.

    Raises:
        ValueError: weights that are missing, unknown or of another shape; the message names the `folder` that they
            are from, and the first three as a release calls them.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    released = {new: old for old, new in RENAMED.items()}
    problems = [f"{released.get(name, name)} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{released.get(name, name)} is not known" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{released.get(name, name)} has shape {found[name]}, not {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"the weights in {folder} do not fit its config: {', '.join(problems[:3])}{more}")
    decoder.load_state_dict(weights, assign=True)


def _read_image_encoder(folder: Path) -> CLIPVisionModel:
    encoder = load_encoder(str(folder))[0].float()
    num_tokens = encoder_tokens_per_scale(encoder.config)[0]
    if num_tokens != TOKEN_COUNTS[0]:
        raise ValueError(f"{folder} makes {num_tokens} tokens of an image, the decoders need {TOKEN_COUNTS[0]}")
    return encoder


def read_vae(folder: Path) -> AutoencoderKL:
    """A VAE that diffusers or the release saved, in fp32.

    Raises:
        FileNotFoundError, ValueError: as `read_weights`, and weights that do not fit the config.
    """
    # Through a whole safetensors file, which diffusers reads in every version of its names for the VAE's attention.
    with tempfile.TemporaryDirectory() as rewritten:
        weights = {name: tensor.contiguous() for name, tensor in read_weights(folder).items()}
        save_file(weights, Path(rewritten) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        (Path(rewritten) / CONFIG_NAME).write_text(json.dumps(read_json(folder / CONFIG_NAME)), encoding="utf-8")
        try:
            vae, info = AutoencoderKL.from_pretrained(rewritten, output_loading_info=True)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the weights in {folder} do not fit its config: {unreadable(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"the weights in {folder} lack {len(missing)} entries, such as {missing[0]}")
    vae.register_to_config(_name_or_path=folder.name)
    return vae
