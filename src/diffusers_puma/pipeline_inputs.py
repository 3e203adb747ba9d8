"""What callers of `PumaPipeline` pass, in one form, or a `ValueError` that says what is wrong. Pure functions."""

import math
from collections.abc import Callable, Collection, Sequence, Sized
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from PIL import Image

from transformers_puma.granularity import MAX_SCALES

# Which decoder does which part of the denoising: (until, scale) in turn, `until` a fraction of the steps.
Schedule = list[tuple[float, int]]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def as_prompts(prompt: str | list[str]) -> list[str]:
    """A prompt or a batch of them as a list.

    Raises:
        ValueError: anything else, or an empty batch.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(item, str) for item in prompts):
        raise ValueError(f"prompt must be a string or a list of strings, got {prompt!r}")
    return list(prompts)


def as_image_groups(image: PipelineImageInput | list) -> list[list[Image.Image]]:
    """For each item of the batch the pictures that belong to it.

    `a` is one item, `[a, b]` two items of one picture, `[[a, b]]` one item of two pictures. A picture is a PIL image,
    or as `output_type` "np" and "pt" give it an array (H, W, 3) or tensor (3, H, W) of floats in [0, 1] (or of
    bytes), of which one with a dimension more is a batch.

    Raises:
        ValueError: anything that is not made of pictures.
    """
    if isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 4:
        image = list(image)
    groups = image if isinstance(image, (list, tuple)) else [image]
    groups = [[_as_pil(item) for item in (group if isinstance(group, (list, tuple)) else [group])] for group in groups]
    if not groups or not all(groups):
        raise ValueError(f"image holds no picture for some item of the batch: {image!r}")
    return groups


def _as_pil(picture: Any) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    if not isinstance(picture, (np.ndarray, torch.Tensor)):
        kind = type(picture).__name__
        raise ValueError(f"image must be a PIL image, array or tensor, a list of them or of lists, got {kind}")
    if picture.dtype in (np.uint8, torch.uint8):
        picture = picture / 255
    array = picture.detach().float().cpu().numpy() if isinstance(picture, torch.Tensor) else picture
    if isinstance(picture, torch.Tensor) and array.ndim == 3:
        array = array.transpose(1, 2, 0)
    is_picture = array.ndim == 3 and array.shape[-1] in (1, 3) and np.issubdtype(array.dtype, np.floating)
    if not (is_picture and array.min() >= 0 and array.max() <= 1):  # so of NaN too
        raise ValueError(
            f"an array (H, W, 3) or tensor (3, H, W) as image must hold floats in [0, 1] or bytes, got "
            f"{picture.dtype} of shape {tuple(picture.shape)}, {array.min()} to {array.max()}"
        )
    return VaeImageProcessor.numpy_to_pil(array)[0]


def is_scale(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and 0 <= value < MAX_SCALES


def as_scales(scale: Any, decoders: list[int], available: list[int], default: int) -> list[int]:
    """The scales to decode.

    Args:
        scale: a scale, several, `"all"` or `"best"` (all that are available), or None.
        decoders: scales whose decoder is there.
        available: those of them that the features can be had of.
        default: what None asks for; if it is not available, the nearest that is, of two equally near the finer one.

    Raises:
        ValueError: no decoder at all, a value that is no scale, or a scale whose decoder is absent.
    """
    if not decoders:
        raise ValueError("this pipeline has no decoders: unet_0 .. unet_4 are all absent")
    if not available:
        raise ValueError(f"this pipeline has decoders for scales {decoders}, but there are no features of any of them")
    if scale is None:
        return [min(available, key=lambda candidate: (abs(candidate - default), candidate))]
    if isinstance(scale, str) and scale in ("all", "best"):
        return available
    scales = list(scale) if isinstance(scale, (list, tuple, range)) else [scale]
    if not scales:
        raise ValueError("scale is an empty list")
    for item in scales:
        if not is_scale(item):
            raise ValueError(f"scale must be 0..{MAX_SCALES - 1}, a list of these, 'all' or 'best', got {item!r}")
        if item not in decoders:
            raise ValueError(f"scale {item} has no decoder here: unet_{item} is absent, there are scales {decoders}")
        if item not in available:
            raise ValueError(f"there are no features of scale {item}, only of scales {available}")
    return list(dict.fromkeys(scales))


def is_schedule(scale: Any) -> bool:
    return isinstance(scale, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in scale)


def as_schedules(scale: Any, decoders: list[int], available: list[int], default: int) -> list[Schedule]:
    """What is to be decoded: one schedule for each scale as in `as_scales`, or the one that `scale` is.

    Raises:
        ValueError: as `as_scales`; fractions that do not rise to 1.
    """
    if not is_schedule(scale):
        return [[(1.0, item)] for item in as_scales(scale, decoders, available, default)]
    if not all(isinstance(item, (list, tuple)) and len(item) == 2 for item in scale):
        raise ValueError(f"a schedule is a list of (until, scale), got {scale!r}")
    untils = [until for until, _ in scale]
    if not all(isinstance(until, (int, float)) for until in untils):
        raise ValueError(f"the fractions of a schedule must be numbers, got {scale!r}")
    if not all(a < b for a, b in zip([0, *untils], untils, strict=False)) or untils[-1] != 1:
        raise ValueError(f"the fractions of a schedule must rise from above 0 to 1.0, got {scale!r}")
    as_scales([item for _, item in scale], decoders, available, default)
    return [[(until, item) for until, item in scale]]


def scale_at(schedule: Schedule, step: int, num_steps: int) -> int:
    """The scale whose decoder does step `step` of `num_steps`."""
    return next(scale for until, scale in schedule if step < round(until * num_steps) or until == 1)


def check_counts(first: Sized, second: Sized, first_name: str, second_name: str) -> None:
    """Raises `ValueError` with both numbers if two batches differ in length."""
    if len(first) != len(second):
        raise ValueError(
            f"got {len(first)} {first_name} and {len(second)} {second_name}: a batch has one of each per item "
            "(image=[[a, b]] is two images for one item)"
        )


def check_features(
    features: dict[int, torch.Tensor], name: str, shapes: dict[int, tuple[int, int]], batch_sizes: Collection[int]
) -> None:
    """Features that a caller brings along.

    Args:
        features: `{scale: (B, k, C)}`, called `name` in messages.
        shapes: `{scale: (k, C)}` of the decoders that will read them.
        batch_sizes: what B may be.

    Raises:
        ValueError: no dict, a missing scale or a wrong shape.
    """
    if not isinstance(features, dict):
        raise ValueError(f"{name} must be a dict of scales, got a {type(features).__name__}")
    for scale, expected in shapes.items():
        if scale not in features:
            raise ValueError(f"{name} holds scales {sorted(features)}, but scale {scale} is to be decoded")
        if not isinstance(features[scale], torch.Tensor):
            raise ValueError(f"{name}[{scale}] must be a tensor, got a {type(features[scale]).__name__}")
        shape = tuple(features[scale].shape)
        if len(shape) != 3 or shape[0] not in batch_sizes or shape[1:] != expected:
            rows = " or ".join(map(str, sorted(batch_sizes)))
            raise ValueError(f"{name}[{scale}] must be of shape ({rows}, {expected[0]}, {expected[1]}), got {shape}")


def check_size(height: int, width: int, factor: int) -> None:
    """Raises `ValueError` for a picture size (pixels) that a VAE which shrinks by `factor` cannot make."""
    for name, value in (("height", height), ("width", width)):
        if not isinstance(value, Integral) or value <= 0 or value % factor:
            raise ValueError(f"{name} must be a positive multiple of {factor}, got {value!r}")


def check_at_least_one(value: int, name: str) -> None:
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_number(value: float, name: str) -> None:
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def check_noise(
    generator: torch.Generator | list[torch.Generator] | None,
    latents: torch.Tensor | None,
    latents_shape: tuple[int, int, int, int],
) -> None:
    """Raises `ValueError` for generators that are not one per picture, or start latents of another shape."""
    generators = [] if generator is None else generator if isinstance(generator, list) else [generator]
    wrong = [type(item).__name__ for item in generators if not isinstance(item, torch.Generator)]
    if wrong:
        raise ValueError(f"generator must be a torch.Generator or a list of them, got {wrong[0]}")
    if isinstance(generator, list) and len(generator) != latents_shape[0]:
        raise ValueError(
            f"got a list of {len(generator)} generators for {latents_shape[0]} images "
            "(number of prompts times num_images_per_prompt)"
        )
    if latents is not None and not isinstance(latents, torch.Tensor):
        raise ValueError(f"latents must be a tensor, got a {type(latents).__name__}")
    if latents is not None and tuple(latents.shape) != latents_shape:
        raise ValueError(f"latents must be of shape {latents_shape}, got {tuple(latents.shape)}")


def check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")


def check_callback(callback: Callable | None, tensor_inputs: Sequence[str], allowed: Sequence[str]) -> None:
    """Raises `ValueError` for a callback that cannot be called, or tensors that it cannot be given."""
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end must be a function, got {callback!r}")
    if not isinstance(tensor_inputs, (list, tuple)) or not all(name in allowed for name in tensor_inputs):
        raise ValueError(
            f"callback_on_step_end_tensor_inputs must be a list of names from {allowed}, got {tensor_inputs!r}"
        )
