"""Rectified flow (paper Section 3, Equations 1-2) as Stable Diffusion 3 trains it, with the released loss."""

import math
from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

WEIGHTINGS = ("released", "velocity")
DENSITIES = ("logit_normal", "mode", "cosmap", "uniform")


@dataclass(frozen=True)
class TimestepDensity:
    """The density of training timesteps (Stable Diffusion 3, Section 3.1), by the names of the released script.

    Args:
        name: `logit_normal`, `mode`, `cosmap` or `uniform`.
        mean: mean of the normal variable of `logit_normal`.
        std: its standard deviation, above 0.
        scale: of `mode`, from -1 to 2/(pi - 2); at 0 it is uniform.

    Raises:
        ValueError: an argument is out of its range.
    """

    name: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    scale: float = 1.29

    def __post_init__(self) -> None:
        if self.name not in DENSITIES:
            raise ValueError(f"model.timesteps.name={self.name}: choose one of {', '.join(DENSITIES)}")
        if not self.std > 0:
            raise ValueError(f"model.timesteps.std={self.std}: must be above 0")
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(f"model.timesteps.scale={self.scale}: must be from -1 to {2 / (math.pi - 2):.3f}")

    def draw(self, generators: list[torch.Generator]) -> Tensor:
        """Draws one value of [0, 1] per generator; 0 is the noisiest timestep."""
        if self.name == "logit_normal":
            normal = torch.cat([torch.randn(1, generator=generator) for generator in generators])
            return (normal * self.std + self.mean).sigmoid()
        u = torch.cat([torch.rand(1, generator=generator) for generator in generators])
        if self.name == "mode":
            return 1 - u - self.scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        if self.name == "cosmap":
            return 1 - 1 / (torch.tan(math.pi * u / 2) + 1)
        return u


LOGIT_NORMAL = TimestepDensity()  # the paper's


class RectifiedFlow:
    """Straight paths from data to noise: `z_t = (1 - sigma) z_0 + sigma eps`, velocity `v = eps - z_0`.

    Args:
        scheduler: its shifted table of sigmas (shift 3.0 for SD3) is the one trained on.
        weighting: `"released"`: mean of `(z_t - sigma v - z_0)^2`, the released script's preconditioning, which weighs
            the plain loss by sigma squared; `"velocity"`: mean of `(v - (eps - z_0))^2`.
        density: density of the timesteps.

    Raises:
        ValueError: the weighting is another word.
    """

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        weighting: str,
        density: TimestepDensity = LOGIT_NORMAL,
    ):
        if weighting not in WEIGHTINGS:
            raise ValueError(f"model.weighting={weighting!r}; choose one of {', '.join(WEIGHTINGS)}")
        table = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        self.timesteps, self.sigmas = table.timesteps, table.sigmas
        self.weighting, self.density = weighting, density

    def draw_timesteps(self, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Draws a timestep in [0, 1000] and its sigma in [0, 1] per generator.

        Their index in the scheduler's table is `floor(1000 u)`, where `u` has the density.
        """
        index = (self.density.draw(generators) * len(self.timesteps)).long().clamp(max=len(self.timesteps) - 1)
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

    def loss_to(self, target: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
        """Returns the loss per image, `(B,)`, of a velocity that should be another one than `noise - clean`.

        Args:
            target: the velocity that is wanted, `(B, C, H, W)`.
            velocity: the predicted one.
            sigma: `(B,)` in [0, 1].
        """
        error = velocity.float() - target
        if self.weighting == "released":
            error = per_image(sigma) * error
        return error.square().mean(dim=(1, 2, 3))


def interpolate(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Returns `z_t` from latent and noise `(B, C, H, W)` and sigma `(B,)`."""
    sigma = per_image(sigma)
    return (1 - sigma) * clean + sigma * noise


def per_image(values: Tensor) -> Tensor:
    """Returns values `(B,)` as `(B, 1, 1, 1)`."""
    return values.view(-1, 1, 1, 1)
