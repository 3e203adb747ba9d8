"""The second stage of `PumaPipeline`: features of one scale -> pictures. Knows no text and no encoder.

Legend: B prompts, N pictures = B times pictures per prompt, k tokens of a scale, C feature channels, D cross-attention
channels, h x w latent size.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers.utils.torch_utils import randn_tensor

from .loading import bring_in
from .pipeline_inputs import Schedule, check_size, scale_at
from .unet_puma import PumaUNet2DConditionModel

Generators = torch.Generator | list[torch.Generator] | None
StepCallback = Callable[["DecoderStageMixin", int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor]]


class DecoderStageMixin:
    """Decoders, scheduler and VAE of a pipeline with the components `unet_<scale>`, `scheduler` and `vae`."""

    _callback_tensor_inputs = ["latents", "encoder_hidden_states"]
    _interrupt = False
    _guidance_scale = 1.0
    _num_timesteps = 0
    _current_scale: int | None = None

    @property
    def current_scale(self) -> int | None:
        """The scale that is being decoded, for callbacks; None outside of a call."""
        return self._current_scale

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `pipe._interrupt = True`, which ends the denoising, as in diffusers."""
        return self._interrupt

    @property
    def guidance_scale(self) -> float:
        """Of the call; a callback may set `pipe._guidance_scale`, for the steps to come, as in diffusers."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """How many steps the denoising has, for callbacks."""
        return self._num_timesteps

    def _unet(self, scale: int) -> PumaUNet2DConditionModel | None:
        return getattr(self, f"unet_{scale}")

    def _check_scheduler(self, num_inference_steps: int) -> None:
        if not hasattr(self.scheduler, "init_noise_sigma"):
            raise ValueError(f"a {type(self.scheduler).__name__} does not start from scaled noise, as a decoder must")
        config = self.scheduler.config
        is_of_flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
        if is_of_flow or hasattr(self.scheduler, "precondition_inputs"):
            raise ValueError(
                f"a {type(self.scheduler).__name__} of flow matching or of EDM's preconditioning does not fit the "
                "decoders, which predict noise or velocity of diffusion"
            )
        # Each scheduler knows how many steps are too many, and says so here.
        self.scheduler.set_timesteps(num_inference_steps)

    def _latents_shape(
        self, scale: int, num_images: int, height: int | None, width: int | None
    ) -> tuple[int, int, int, int]:
        """(N, latent channels, h, w) for pictures of `height` x `width` pixels, by default the decoder's own size."""
        factor, sample_size = self.vae_scale_factor, self._unet(scale).config.sample_size
        height = sample_size * factor if height is None else height
        width = sample_size * factor if width is None else width
        check_size(height, width, factor)
        return num_images, self.vae.config.latent_channels, height // factor, width // factor

    def _cross_attention_states(
        self, scale: int, features: torch.Tensor, negative: torch.Tensor | None, num_images_per_prompt: int
    ) -> torch.Tensor:
        """Projects features (B, k, C) once per picture.

        Returns:
            (N, k, D); with `negative` (1 or B, k, C) features (2 N, k, D), conditional rows first.
        """
        unet = self._unet(scale)
        device = bring_in(self, unet)
        rows = features if negative is None else torch.cat([features, negative.to(features)])
        conditional = torch.arange(len(rows), device=device) < len(features)
        states = unet.project_features(rows.to(device, unet.dtype), conditional)
        positive = states[: len(features)].repeat_interleave(num_images_per_prompt, dim=0)
        if negative is None:
            return positive
        unconditional = states[len(features) :].repeat_interleave(len(positive) // len(negative), dim=0)
        return torch.cat([positive, unconditional])

    def _start_latents(
        self,
        scale: int,
        shape: tuple[int, int, int, int],
        num_inference_steps: int,
        generator: Generators,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """Noise of `shape`, as strong as the scheduler starts from; sets the scheduler's timesteps."""
        unet = self._unet(scale)
        device = bring_in(self, unet)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=unet.dtype)
        return latents.to(device, unet.dtype) * self.scheduler.init_noise_sigma

    def _denoise(
        self,
        latents: torch.Tensor,
        schedule: Schedule,
        states: dict[int, torch.Tensor],
        generator: Generators,
        callback: StepCallback | None,
        callback_tensors: Sequence[str],
    ) -> torch.Tensor:
        """The reverse process, (N, channels, h, w) -> the same; each step by the decoder that `schedule` says.

        All decoders share the latent space and the noise levels, so one can go on where another stopped.
        """
        # Some schedulers are deterministic and take no generator.
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generator} if takes_generator else {}
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=len(timesteps)) as bar, self._decoding():
            for step, timestep in enumerate(timesteps):
                scale = scale_at(schedule, step, len(timesteps))
                if scale != self.current_scale:
                    self._current_scale = scale
                    bring_in(self, self._unet(scale))
                    bar.set_postfix_str(f"scale {scale}", refresh=False)
                noise = self._predict_noise(latents, timestep, states[scale])
                latents = self.scheduler.step(noise, timestep, latents, **step_kwargs).prev_sample
                bar.update()
                if callback is not None:
                    tensors = {"latents": latents, "encoder_hidden_states": states[scale]}
                    changed = callback(self, step, timestep, {name: tensors[name] for name in callback_tensors}) or {}
                    latents = changed.get("latents", latents)
                    states[scale] = changed.get("encoder_hidden_states", states[scale])
                if self.interrupt:
                    break
        return latents

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """Afterwards no scale is being decoded, however it ended."""
        try:
            yield
        finally:
            self._current_scale = None

    def _predict_noise(self, latents: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """eps = eps_uncond + g (eps_cond - eps_uncond); for g <= 1 the conditional branch alone."""
        is_guided = self.do_classifier_free_guidance
        sample = torch.cat([latents, latents]) if is_guided else latents
        noise = self._unet(self.current_scale)(
            self.scheduler.scale_model_input(sample, timestep),
            timestep,
            encoder_hidden_states=states[: len(sample)],  # conditional rows first: a callback may end the guidance
            added_cond_kwargs={"projected": True},
        ).sample
        if not is_guided:
            return noise
        conditional, unconditional = noise.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (N, channels, h, w) to pictures (N, 3, height, width) in [-1, 1].

        A VAE that asks for it (`force_upcast`) never decodes in fp16, whose range its activations leave.
        """
        device, dtype = bring_in(self, self.vae), self.vae.dtype
        needs_upcast = self.vae.config.force_upcast and dtype == torch.float16
        if needs_upcast:
            self.vae.to(torch.float32)
        try:
            latents = latents.to(device, self.vae.dtype) / self.vae.config.scaling_factor
            return self.vae.decode(latents, return_dict=False)[0]
        finally:
            if needs_upcast:
                self.vae.to(dtype)
