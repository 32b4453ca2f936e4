"""One draw of the degradation: dice with a generator per image, and the values they give, tensors `(B,)` on the CPU."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Self

import torch
from torch import Tensor

from dit4sr_pl.degradation.kernels import blur_kernels, sinc_kernels


class Range(NamedTuple):
    """An interval, both ends included."""

    low: float
    high: float


class Dice:
    """One generator per image, so that what an image draws is a function of its own seed alone."""

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def uniform(self, low: float | Tensor, high: float | Tensor) -> Tensor:
        draws = [torch.rand((), generator=generator, dtype=torch.float64) for generator in self.generators]
        return low + (high - low) * torch.stack(draws)

    def happens(self, probability: float) -> Tensor:
        return self.uniform(0, 1) < probability

    def pick(self, probabilities: Sequence[float]) -> Tensor:
        """Indices into `probabilities`, which sum to 1."""
        edges = torch.tensor(probabilities, dtype=torch.float64).cumsum(0)[:-1]
        return torch.searchsorted(edges, self.uniform(0, 1), right=True)

    def odd(self, sizes: Range) -> Tensor:
        """Odd integers, uniform over the range."""
        halves = self.uniform(sizes.low // 2, sizes.high // 2 + 1).floor().long()
        return 2 * halves + 1

    def around_one(self, limits: Range) -> Tensor:
        """Half of the time uniform in low..1, half of the time in 1..high."""
        below = self.happens(0.5)
        return torch.where(below, self.uniform(limits.low, 1), self.uniform(1, limits.high))

    def seeds(self) -> Tensor:
        return torch.stack([torch.randint(2**63 - 1, (), generator=generator) for generator in self.generators])


class Drawn:
    """Base of the drawn values: each field is a tensor `(B,)` or a further set. Indexed, it gives one image's."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def __getitem__(self, index: int) -> Self:
        return type(self)(*(getattr(self, field.name)[index] for field in fields(self)))

    def scalars(self) -> dict[str, Tensor]:
        """Everything drawn but the noise seeds, flat: `{"first/blur/sigma_x": (B,) float32, ...}`.

        A value is there also where the switch beside it leaves it unused, as `sigma` where `poisson` is 1.
        """
        flat = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Drawn):
                flat |= {f"{field.name}/{name}": scalar for name, scalar in value.scalars().items()}
            elif field.name != "seed":
                flat[field.name] = value.float()
        return flat


@dataclass(frozen=True)
class DrawnBlur(Drawn):
    on: Tensor
    kind: Tensor
    size: Tensor
    sigma_x: Tensor
    sigma_y: Tensor
    angle: Tensor
    beta: Tensor
    cutoff: Tensor

    def kernels(self, canvas: int) -> Tensor:
        """Kernels `(B, canvas, canvas)`, float64."""
        return blur_kernels(
            self.kind, self.size, self.sigma_x, self.sigma_y, self.angle, self.beta, self.cutoff, canvas
        )


@dataclass(frozen=True)
class DrawnSinc(Drawn):
    on: Tensor
    size: Tensor
    cutoff: Tensor

    def kernels(self, canvas: int) -> Tensor:
        """Kernels `(B, canvas, canvas)`, float64."""
        return sinc_kernels(self.size, self.cutoff, canvas)


@dataclass(frozen=True)
class DrawnResize(Drawn):
    factor: Tensor
    mode: Tensor


@dataclass(frozen=True)
class DrawnNoise(Drawn):
    poisson: Tensor
    grey: Tensor
    sigma: Tensor
    poisson_scale: Tensor
    seed: Tensor


@dataclass(frozen=True)
class DrawnStage(Drawn):
    blur: DrawnBlur
    resize: DrawnResize
    noise: DrawnNoise
    quality: Tensor


@dataclass(frozen=True)
class DrawnFinal(Drawn):
    mode: Tensor
    jpeg_first: Tensor
    sinc: DrawnSinc


@dataclass(frozen=True)
class DrawnDegradation(Drawn):
    """All that one batch draws; with the images it decides the outcome, so it can be logged and replayed."""

    first: DrawnStage
    second: DrawnStage
    final: DrawnFinal
