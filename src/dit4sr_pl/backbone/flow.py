"""Rectified flow (paper Section 3, Equations 1-2) as Stable Diffusion 3 trains it, with the released loss."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

WEIGHTINGS = ("released", "velocity")


class RectifiedFlow:
    """Straight paths from data to noise: `z_t = (1 - sigma) z_0 + sigma eps`, velocity `v = eps - z_0`.

    Args:
        scheduler: its shifted table of sigmas (shift 3.0 for SD3) is the one trained on.
        weighting: `"released"`: mean of `(z_t - sigma v - z_0)^2`, the released script's preconditioning, which weighs
            the plain loss by sigma squared; `"velocity"`: mean of `(v - (eps - z_0))^2`.

    Raises:
        ValueError: the weighting is another word.
    """

    def __init__(self, scheduler: FlowMatchEulerDiscreteScheduler, weighting: str):
        if weighting not in WEIGHTINGS:
            raise ValueError(f"loss weighting {weighting!r}; choose one of {', '.join(WEIGHTINGS)}")
        table = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        self.timesteps, self.sigmas = table.timesteps, table.sigmas
        self.weighting = weighting

    def draw_timesteps(self, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Draws a timestep in [0, 1000] and its sigma in [0, 1] per generator.

        Their index in the scheduler's table is `floor(1000 u)`, where `u` is logit-normal(0, 1).
        """
        normal = torch.cat([torch.randn(1, generator=generator) for generator in generators])
        index = (normal.sigmoid() * len(self.timesteps)).long().clamp(max=len(self.timesteps) - 1)
        return self.timesteps[index], self.sigmas[index]

    def loss(self, velocity: Tensor, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Returns the loss per image, `(B,)`.

        Args:
            velocity: predicted velocity `(B, C, H, W)` at `interpolate(clean, noise, sigma)`.
            clean: latents `(B, C, H, W)`.
            noise: `(B, C, H, W)`.
            sigma: `(B,)` in [0, 1].
        """
        velocity = velocity.float()
        if self.weighting == "velocity":
            error = velocity - (noise - clean)
        else:
            error = interpolate(clean, noise, sigma) - per_image(sigma) * velocity - clean
        return error.square().mean(dim=(1, 2, 3))


def interpolate(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Returns `z_t` from latent and noise `(B, C, H, W)` and sigma `(B,)`."""
    sigma = per_image(sigma)
    return (1 - sigma) * clean + sigma * noise


def per_image(values: Tensor) -> Tensor:
    """Returns values `(B,)` as `(B, 1, 1, 1)`."""
    return values.view(-1, 1, 1, 1)
