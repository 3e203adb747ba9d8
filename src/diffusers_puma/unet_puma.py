"""The decoder of one scale: diffusers' UNet with a feature projection, and a position table for the finest scale.

All that PUMA adds to the UNet of Stable Diffusion XL is what happens to its cross-attention input. Image features of
one scale take the place of the text embedding (report section 3.2): a Linear brings them to the cross-attention width,
and in the 256-token decoder a learned table tells the tokens apart by position.

Legend: B images, k tokens of this decoder's scale, C feature channels, D cross-attention channels.
"""

import math
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import nn
from torch.utils.checkpoint import checkpoint


def coordinate_channels(sample: torch.Tensor, num_channels: int) -> torch.Tensor:
    """Sine and cosine of each pixel's place in a latent picture (B, channels, height, width), any size.

    Returns:
        (B, num_channels, height, width) in the sample's type: for each of num_channels / 4 frequencies the sine and
        cosine of pi * 2^n * y and of pi * 2^n * x, with y and x from 0 to 1 over the picture.
    """
    height, width = sample.shape[-2:]
    frequencies = math.pi * 2.0 ** torch.arange(num_channels // 4, device=sample.device)
    y = (torch.arange(height, device=sample.device) + 0.5) / height
    x = (torch.arange(width, device=sample.device) + 0.5) / width
    angles_y = (frequencies[:, None] * y)[:, :, None].expand(-1, -1, width)
    angles_x = (frequencies[:, None] * x)[:, None, :].expand(-1, height, -1)
    angles = torch.cat([angles_y, angles_x])
    channels = torch.cat([angles.sin(), angles.cos()]).to(sample.dtype)
    return channels.expand(sample.shape[0], -1, -1, -1)


def initial_position_table(num_tokens: int, channels: int) -> torch.Tensor:
    """(1, num_tokens, channels): sines and cosines of the place in a square grid of tokens, in fp32."""
    return get_2d_sincos_pos_embed(channels, math.isqrt(num_tokens), output_type="pt").float()[None]


class PumaUNet2DConditionModel(UNet2DConditionModel):
    """`UNet2DConditionModel` that denoises latents given the image features of one scale.

    Its config is the stock UNet's, with `encoder_hid_dim` = C and `encoder_hid_dim_type="text_proj"` for the
    projection (`encoder_hid_proj`), plus:

    Args:
        num_tokens: k, how many tokens of features this decoder takes; a square number.
        use_position_table: adds `position_table` (1, k, D) to the projected features of conditional rows, as the
            released 256-token decoder does. A new table starts as a 2-D sine and cosine table over the tokens' grid,
            not at random: a small UNet that started without any sense of position was seen to ignore its 256 tokens.
            Loaded weights replace it.
        position_channels: that many fixed coordinate channels (a multiple of 4) are appended to `sample`, so
            `in_channels` is the latents' channels plus these. 0, as in SDXL and the release, when the UNet is large
            enough to find positions by itself; without them the queries of a small one carry no position.

    Raises:
        ValueError: without a feature projection, or if the numbers above don't fit each other.
    """

    @register_to_config
    def __init__(
        self, num_tokens: int = 256, use_position_table: bool = False, position_channels: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if self.config.encoder_hid_dim_type != "text_proj":
            raise ValueError(
                "encoder_hid_dim must be the image features' channel count and encoder_hid_dim_type 'text_proj', "
                f"got {self.config.encoder_hid_dim} and {self.config.encoder_hid_dim_type!r}"
            )
        grid_size = math.isqrt(num_tokens)
        if num_tokens < 1 or grid_size**2 != num_tokens:
            raise ValueError(f"num_tokens must be a square number, the tokens of a square grid, got {num_tokens}")
        if position_channels % 4 or not 0 <= position_channels < self.config.in_channels:
            raise ValueError(
                f"position_channels must be a multiple of 4 below in_channels={self.config.in_channels}, "
                f"got {position_channels}"
            )
        if use_position_table:
            self.position_table = nn.Parameter(initial_position_table(num_tokens, self.encoder_hid_proj.out_features))

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        # The stock UNet's arguments arrive through **kwargs, where diffusers, which reads the signature to find out
        # which config keys a class takes, cannot see them.
        keys = UNet2DConditionModel._get_init_keys(input_class)
        if issubclass(input_class, PumaUNet2DConditionModel):
            keys |= UNet2DConditionModel._get_init_keys(UNet2DConditionModel)
        return keys

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """`enable_gradient_checkpointing` under the name that `transformers.Trainer` calls.

        Raises:
            ValueError: for `every_n_layers` or `offload`, which diffusers' models cannot do.
        """
        if every_n_layers != 1 or offload:
            raise ValueError(f"a decoder checkpoints every block, got {every_n_layers=} and {offload=}")
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        self.enable_gradient_checkpointing(partial(checkpoint, **options))

    def project_features(self, features: torch.Tensor, conditional: bool | torch.Tensor = True) -> torch.Tensor:
        """Features of this decoder's scale (B, k, C) as cross-attention states (B, k, D).

        Args:
            conditional: which rows describe a picture; a bool for all, or (B,) bool. The others hold the features of
                the black image, for classifier-free guidance, and get no position table, as in the release.

        Raises:
            ValueError: if the features are not (B, k, C).
        """
        tokens, channels = self.config.num_tokens, self.config.encoder_hid_dim
        if features.dim() != 3 or features.shape[1:] != (tokens, channels):
            raise ValueError(
                f"this decoder takes features of shape (batch, {tokens}, {channels}), got {tuple(features.shape)}"
            )
        states = self.encoder_hid_proj(features)
        if self.config.use_position_table:
            rows = torch.as_tensor(conditional, device=states.device).expand(features.shape[0])
            states = states + rows[:, None, None].to(states.dtype) * self.position_table.to(states.dtype)
        return states

    def process_encoder_hidden_states(
        self, encoder_hidden_states: torch.Tensor, added_cond_kwargs: dict[str, Any] | None
    ) -> torch.Tensor:
        """The stock UNet's hook for `encoder_hidden_states`, called by `forward`."""
        condition = added_cond_kwargs or {}
        if condition.get("projected", False):
            return encoder_hidden_states
        return self.project_features(encoder_hidden_states, condition.get("conditional", True))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> UNet2DConditionOutput | tuple:
        """As the stock forward, with features in `encoder_hidden_states`.

        Args:
            sample: (B, latent channels, height, width) noisy latents.
            timestep: a number, or (B,).
            encoder_hidden_states: (B, k, C) features, projected here; or, with
                `added_cond_kwargs={"projected": True}`, (B, k, D) as `project_features` returned them, so that a
                picture's features are projected once and not once per step. `added_cond_kwargs={"conditional": mask}`
                with a (B,) bool tells which rows describe a picture (all, if not given; see `project_features`).
        """
        if self.config.position_channels:
            sample = torch.cat([sample, coordinate_channels(sample, self.config.position_channels)], dim=1)
        return super().forward(sample, timestep, encoder_hidden_states, *args, **kwargs)
