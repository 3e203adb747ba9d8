"""From a state of the language model to an image feature: by regression, or as a sample of a flow.

Legend: n tokens, H hidden size, C feature channels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

Generators = torch.Generator | list[torch.Generator] | None


class PumaRegressionHead(nn.Linear):
    """One Linear: a feature is the mean of what may stand there (report section 3.3).

    Nothing but `forward`: PEFT wraps a Linear (`target_modules="all-linear"`), and no other method of it is left.
    """

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(states.to(self.bias.dtype))  # may be trained in fp32 on a backbone in half precision


class PumaFlowHead(nn.Module):
    """A flow per token: a small network moves noise to a feature along straight lines, given the token's state.

    Rectified flow (Liu et al., arXiv 2209.03003) in the place of a token's regression, as the diffusion of Li et al.,
    arXiv 2406.11838. x_t = (1 - t) noise + t feature, and the network predicts the velocity feature - noise. It works
    on features standardised with `mean` and `std` (num_scales, C), which training sets once, to the same row for all
    scales (`standardize_feature_heads`).

    Args:
        hidden_size: H.
        feature_size: C.
        num_scales: of the model.
        width, num_layers: of the network.
    """

    def __init__(self, hidden_size: int, feature_size: int, num_scales: int, width: int, num_layers: int):
        super().__init__()
        self.feature_size = feature_size
        self.state_proj = nn.Linear(hidden_size, width)
        self.time_proj = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.in_proj = nn.Linear(feature_size, width)
        self.layers = nn.ModuleList(FlowLayer(width) for _ in range(num_layers))
        self.out_proj = nn.Linear(width, feature_size)
        self.register_buffer("mean", torch.zeros(num_scales, feature_size))
        self.register_buffer("std", torch.ones(num_scales, feature_size))

    def start(self) -> None:
        """Velocities start at zero, and features count as standardised until training says otherwise."""
        for weight in (self.out_proj.weight, self.out_proj.bias, self.mean):
            init.zeros_(weight)
        init.ones_(self.std)

    def forward(self, noisy: torch.Tensor, time: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Velocity (.., C) at x_t `noisy` (.., C) and t `time` (..) in [0, 1], given `states` (.., H)."""
        return self._velocity(noisy, self._embed(time), self._project(states))

    def _velocity(self, noisy: torch.Tensor, times: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """As `forward`, from embedded times and projected states, (.., width) both."""
        condition = states + times
        hidden = self.in_proj(noisy.to(self.in_proj.bias.dtype))
        for layer in self.layers:
            hidden = layer(hidden, condition)
        return self.out_proj(F.silu(hidden))

    def loss_pair(
        self, states: torch.Tensor, features: torch.Tensor, scales: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicted and true velocity, (n, C) each, at random times; from the global random state.

        Args:
            states: (n, H) of tokens at `scales` (n,).
            features: (n, C), what is to stand there.
        """
        features, scales = features.to(self.std.device), scales.to(self.std.device)
        target = (features.float() - self.mean[scales]) / self.std[scales]
        noise, time = torch.randn_like(target), torch.rand(len(target), device=target.device)
        velocity = self(torch.lerp(noise, target, time[:, None]), time, states)
        return velocity, target - noise

    def predict(self, states: torch.Tensor, scales: torch.Tensor, noise: torch.Tensor, num_steps: int) -> torch.Tensor:
        """Features (B, m, C) from states (B, m, H) and unit noise (B, m, C), by `num_steps` Euler steps."""
        states, scales, noise = (given.to(self.std.device) for given in (states, scales, noise))
        sample, projected = noise, self._project(states)
        for times in self._embed(torch.arange(num_steps, device=noise.device) / num_steps):
            sample = sample + self._velocity(sample, times, projected).float() / num_steps
        return (sample * self.std[scales] + self.mean[scales]).to(states.dtype)

    def draw_noise(
        self, num_rows: int, counts: Sequence[int], generator: Generators, device: torch.device
    ) -> torch.Tensor:
        """(B, sum of `counts`, C) unit noise, drawn part by part: further parts change none before them, nor what is
        left of the generators.

        Args:
            generator: a list with one for each row makes each row the same in any batch.
        """
        generators = [_split(g, device) for g in (generator if isinstance(generator, list) else [generator])]
        rows = num_rows // len(generators)
        parts = [
            torch.cat(
                [
                    # On the generator's own device: the same seed gives the same noise on any.
                    torch.randn(rows, count, self.feature_size, generator=g, device=g.device).to(device)
                    for g in generators
                ]
            )
            for count in counts
        ]
        return torch.cat(parts, dim=1)

    # A weight may be quantised: the bias has the type of what is computed.

    def _project(self, states: torch.Tensor) -> torch.Tensor:
        return self.state_proj(states.to(self.state_proj.bias.dtype))

    def _embed(self, time: torch.Tensor) -> torch.Tensor:
        """Times (..) -> (.., width), from their sines and cosines."""
        half = self.time_proj[0].in_features // 2
        frequencies = torch.logspace(0, 3, half, device=time.device)
        angles = time.float().unsqueeze(-1) * frequencies
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return self.time_proj(waves.to(self.in_proj.bias.dtype))


class FlowLayer(nn.Module):
    """A residual perceptron whose input is scaled and shifted, and whose output is gated, by the condition."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.perceptron = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, hidden: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """(.., width) both."""
        shift, scale, gate = self.modulation(F.silu(condition)).chunk(3, dim=-1)
        return hidden + gate * self.perceptron(self.norm(hidden) * (1 + scale) + shift)


def _split(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """A generator that is seeded by one draw from another, or from the global random state of a device."""
    device = device if generator is None else generator.device
    seed = torch.randint(2**63 - 1, (), generator=generator, device=device)
    return torch.Generator(device).manual_seed(seed.item())
