"""The denoising objective, as pure functions of tensors and a scheduler's noise levels.

Legend: B pictures, latents (B, c, h, w) already multiplied by the VAE's scaling factor, timesteps (B,) long.
"""

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr


def sample_noise(latents: torch.Tensor, noise_offset: float) -> torch.Tensor:
    """Gaussian noise shaped like `latents`, plus `noise_offset` times one Gaussian number per picture and channel.

    The offset teaches a decoder to move the mean of a whole picture (report section 4.1 trains with 0.1).
    """
    shift = torch.randn(*latents.shape[:2], 1, 1, device=latents.device, dtype=latents.dtype)
    return torch.randn_like(latents) + noise_offset * shift


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
