"""One draw of the degradation: a generator per image and the values that it gives, tensors `(B,)` on the CPU."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Self

import torch
from torch import Tensor

from dit4sr_pl.degradation.kernels import blur_kernels, sinc_kernels


class Range(NamedTuple):
    """An interval that includes both ends."""

    low: float
    high: float


class Dice:
    """One generator per image, so that what an image draws is a function of its own seed alone."""

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def uniform(self, low: float | Tensor, high: float | Tensor) -> Tensor:
        """Returns float64 `(B,)`, uniform in low..high."""
        draws = [torch.rand((), generator=generator, dtype=torch.float64) for generator in self.generators]
        return low + (high - low) * torch.stack(draws)

    def happens(self, probability: float) -> Tensor:
        """Returns bool `(B,)`, True with the given probability."""
        return self.uniform(0, 1) < probability

    def pick(self, probabilities: Sequence[float]) -> Tensor:
        """Returns indices `(B,)` into `probabilities`, which sum to 1."""
        edges = torch.tensor(probabilities, dtype=torch.float64).cumsum(0)[:-1]
        return torch.searchsorted(edges, self.uniform(0, 1), right=True)

    def odd(self, sizes: Range) -> Tensor:
        """Returns odd integers `(B,)`, uniform over the range."""
        halves = self.uniform(sizes.low // 2, sizes.high // 2 + 1).floor().long()
        return 2 * halves + 1

    def around_one(self, limits: Range) -> Tensor:
        """Returns `(B,)`: half of the time uniform in low..1, half of the time uniform in 1..high."""
        below = self.happens(0.5)
        return torch.where(below, self.uniform(limits.low, 1), self.uniform(1, limits.high))

    def seeds(self) -> Tensor:
        """Returns int64 seeds `(B,)` for generators of noise."""
        return torch.stack([torch.randint(2**63 - 1, (), generator=generator) for generator in self.generators])


class Drawn:
    """Base of the drawn values: fields are tensors `(B,)` or `Drawn` themselves; an index selects one image."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def __getitem__(self, index: int) -> Self:
        return type(self)(*(getattr(self, field.name)[index] for field in fields(self)))

    def scalars(self) -> dict[str, Tensor]:
        """Returns all drawn values except noise seeds, flat: `{"first/blur/sigma_x": (B,) float32, ...}`.

        A value is there even if a switch next to it leaves it unused, such as `sigma` where `poisson` is 1.
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
    """The drawn values of a blur: whether it happens, and the arguments of `kernels.blur_kernels`."""

    on: Tensor
    kind: Tensor
    size: Tensor
    sigma_x: Tensor
    sigma_y: Tensor
    angle: Tensor
    beta: Tensor
    cutoff: Tensor

    def kernels(self, canvas: int) -> Tensor:
        """Returns kernels `(B, canvas, canvas)`, float64."""
        return blur_kernels(
            self.kind, self.size, self.sigma_x, self.sigma_y, self.angle, self.beta, self.cutoff, canvas
        )


@dataclass(frozen=True)
class DrawnSinc(Drawn):
    """The drawn values of the final sinc filter: whether it happens, size in pixels, cut-off in radians per pixel."""

    on: Tensor
    size: Tensor
    cutoff: Tensor

    def kernels(self, canvas: int) -> Tensor:
        """Returns kernels `(B, canvas, canvas)`, float64."""
        return sinc_kernels(self.size, self.cutoff, canvas)


@dataclass(frozen=True)
class DrawnResize(Drawn):
    """The drawn values of a resize: factor, and index into `ops.MODES`."""

    factor: Tensor
    mode: Tensor


@dataclass(frozen=True)
class DrawnNoise(Drawn):
    """The drawn values of the noise: its kind, whether it is grey, its strengths, and the seed of its field."""

    poisson: Tensor
    grey: Tensor
    sigma: Tensor
    poisson_scale: Tensor
    seed: Tensor


@dataclass(frozen=True)
class DrawnStage(Drawn):
    """The drawn values of one pass; `quality` is JPEG's, 1..100."""

    blur: DrawnBlur
    resize: DrawnResize
    noise: DrawnNoise
    quality: Tensor


@dataclass(frozen=True)
class DrawnFinal(Drawn):
    """The drawn values of the last steps: mode of the resize, whether JPEG comes first, and the sinc filter."""

    mode: Tensor
    jpeg_first: Tensor
    sinc: DrawnSinc


@dataclass(frozen=True)
class DrawnDegradation(Drawn):
    """All values that one batch draws. With the images they decide the result, so they can be logged and replayed."""

    first: DrawnStage
    second: DrawnStage
    final: DrawnFinal
