"""The denoising objective, as pure functions of tensors and a scheduler's noise levels.

Legend: B pictures, latents (B, c, h, w) already multiplied by the VAE's scaling factor, timesteps (B,) long.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr


def sample_noise(latents: torch.Tensor, noise_offset: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Gaussian noise shaped like `latents`, plus `noise_offset` times one Gaussian number per picture and channel.

    The offset teaches a decoder to move the mean of a whole picture (report section A.1.2 trains with 0.1).
    """
    options = {"generator": generator, "device": latents.device, "dtype": latents.dtype}
    shift = torch.randn(*latents.shape[:2], 1, 1, **options)
    return torch.randn(latents.shape, **options) + noise_offset * shift


class Draws(NamedTuple):
    """What is random in a denoising step: `noise` (B, c, h, w), `timesteps` (B,) and `conditional` (B,) bool, False
    where a picture is dropped."""

    noise: torch.Tensor
    timesteps: torch.Tensor
    conditional: torch.Tensor


def draw(
    latents: torch.Tensor,
    keys: Sequence[tuple[int, ...]],
    num_timesteps: int,
    noise_offset: float = 0.0,
    image_dropout: float = 0.0,
) -> Draws:
    """Draws each picture's numbers from a generator of its own, so that they depend on its key alone.

    Args:
        keys: one for each picture, such as (seed, step, place in the global batch): however the batch is spread over
            processes and micro-batches, a picture gets the same numbers, and no two get the same.
    """
    noise, timesteps, uniform = [], [], []
    for latent, key in zip(latents, keys, strict=True):
        seed = np.random.SeedSequence(key).generate_state(1, np.uint64).item()
        generator = torch.Generator(latents.device).manual_seed(seed)
        noise.append(sample_noise(latent[None], noise_offset, generator))
        timesteps.append(torch.randint(num_timesteps, (1,), generator=generator, device=latents.device))
        uniform.append(torch.rand(1, generator=generator, device=latents.device))
    return Draws(torch.cat(noise), torch.cat(timesteps), torch.cat(uniform) >= image_dropout)


def denoising_target(
    noise_scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the decoder is to predict under the scheduler's `prediction_type`, shaped like `latents`."""
    if noise_scheduler.config.prediction_type == "epsilon":
        return noise
    if noise_scheduler.config.prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    raise ValueError(
        f"prediction_type must be 'epsilon' or 'v_prediction', got {noise_scheduler.config.prediction_type!r}"
    )


def denoising_loss(
    noise_scheduler: DDPMScheduler,
    prediction: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    min_snr_gamma: float | None = None,
) -> torch.Tensor:
    """Mean squared error of `prediction` (B, c, h, w) against the target, computed in fp32; a scalar.

    Args:
        min_snr_gamma: if given, each picture counts min(SNR, gamma) / SNR of what its prediction of the clean latents
            would count (Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", 2023; gamma 5). A
            noise level of zero SNR then counts nothing.
    """
    target = denoising_target(noise_scheduler, latents, noise, timesteps)
    errors = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))
    if min_snr_gamma is None:
        return errors.mean()
    snr = compute_snr(noise_scheduler, timesteps)
    predicts_velocity = noise_scheduler.config.prediction_type == "v_prediction"
    weights = snr.clamp(max=min_snr_gamma) / (snr + 1 if predicts_velocity else snr)
    return (weights * errors).mean()
