"""The settings of the degradation, checked when they are read; each class draws the values that it describes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from dit4sr_pl.degradation.draws import (
    Dice,
    DrawnBlur,
    DrawnFinal,
    DrawnNoise,
    DrawnResize,
    DrawnSinc,
    DrawnStage,
    Range,
)
from dit4sr_pl.degradation.kernels import GENERALIZED, ISOTROPIC, KINDS, PLATEAU, SINC
from dit4sr_pl.degradation.ops import MODES, sharpen

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Sharpen:
    """Unsharp masking: `kernel_size` in pixels, odd; `threshold` in levels of 0..255."""

    kernel_size: int
    weight: float
    threshold: float

    def __post_init__(self):
        _require(self.kernel_size % 2 == 1, f"kernel_size must be odd, not {self.kernel_size}")

    def apply(self, image: Tensor) -> Tensor:
        """Returns the sharpened image; see `ops.sharpen`."""
        return sharpen(image, self.kernel_size, self.weight, self.threshold)


@dataclass(frozen=True)
class BlurSinc:
    """Sinc in place of a Gaussian family; its cut-offs, in units of pi, are `cutoff_small` for sizes under `small`."""

    probability: float
    small: int
    cutoff_small: Range
    cutoff_large: Range

    def __post_init__(self):
        _require_probability("probability", self.probability)
        _require_cutoff("cutoff_small", self.cutoff_small)
        _require_cutoff("cutoff_large", self.cutoff_large)


@dataclass(frozen=True)
class Blur:
    """Settings of a blur: `size` is odd and `sigma` positive, both in pixels; `kinds` are families by probability."""

    probability: float
    size: Range
    kinds: dict[str, float]
    sinc: BlurSinc
    sigma: Range
    beta_generalized: Range
    beta_plateau: Range

    def __post_init__(self):
        _require_probability("probability", self.probability)
        _require_odd("size", self.size)
        _require(set(self.kinds) == set(KINDS) - {"sinc"}, f"kinds must name {', '.join(KINDS[:SINC])}")
        _require_sum_of_one("kinds", self.kinds.values())
        _require(self.sigma.low > 0, f"sigma must be positive, not from {self.sigma.low:g}")
        _require_around_one("beta_generalized", self.beta_generalized)
        _require_around_one("beta_plateau", self.beta_plateau)

    def draw(self, dice: Dice) -> DrawnBlur:
        """Draws one blur per image."""
        size, family = dice.odd(self.size), dice.pick([self.kinds[kind] for kind in KINDS[:SINC]])
        kind = torch.where(dice.happens(self.sinc.probability), SINC, family)
        isotropic, sigma_x, sigma_y = ISOTROPIC[kind], dice.uniform(*self.sigma), dice.uniform(*self.sigma)
        angle = dice.uniform(-math.pi, math.pi)
        small, large = dice.uniform(*self.sinc.cutoff_small), dice.uniform(*self.sinc.cutoff_large)
        return DrawnBlur(
            on=dice.happens(self.probability),
            kind=kind,
            size=size,
            sigma_x=sigma_x,
            sigma_y=torch.where(isotropic, sigma_x, sigma_y),
            angle=torch.where(isotropic, 0, angle),
            beta=self._beta(dice, kind),
            cutoff=math.pi * torch.where(size < self.sinc.small, small, large),
        )

    def _beta(self, dice: Dice, kind: Tensor) -> Tensor:
        generalized, plateau = dice.around_one(self.beta_generalized), dice.around_one(self.beta_plateau)
        return torch.where(GENERALIZED[kind], generalized, torch.where(PLATEAU[kind], plateau, 1))


@dataclass(frozen=True)
class Resize:
    """Probabilities of enlarging, reducing and keeping the size; `factor.low`..1 reduces, 1..`factor.high` enlarges."""

    up: float
    down: float
    keep: float
    factor: Range

    def __post_init__(self):
        _require_sum_of_one("up, down, keep", (self.up, self.down, self.keep))
        _require_around_one("factor", self.factor)
        _require(self.factor.low > 0, f"factor must be positive, not from {self.factor.low:g}")

    def draw(self, dice: Dice) -> DrawnResize:
        """Draws one factor and one mode per image."""
        direction = dice.pick((self.up, self.down, self.keep))
        up, down = dice.uniform(1, self.factor.high), dice.uniform(self.factor.low, 1)
        factor = torch.where(direction == 0, up, torch.where(direction == 1, down, 1))
        return DrawnResize(factor, draw_mode(dice))


@dataclass(frozen=True)
class Noise:
    """Settings of the noise, which is Gaussian with probability `gaussian` and Poisson otherwise.

    Args:
        gaussian: probability of Gaussian noise.
        sigma: range of its standard deviation, in levels of 0..255.
        poisson_scale: range of the factor of Poisson noise.
        grey: probability of grey noise, which is the same in all three colours.
    """

    gaussian: float
    sigma: Range
    poisson_scale: Range
    grey: float

    def __post_init__(self):
        _require_probability("gaussian", self.gaussian)
        _require_probability("grey", self.grey)
        _require(min(self.sigma.low, self.poisson_scale.low) >= 0, "sigma and poisson_scale must not be negative")

    def draw(self, dice: Dice) -> DrawnNoise:
        """Draws kind, strength and seed of one noise per image."""
        return DrawnNoise(
            poisson=~dice.happens(self.gaussian),
            grey=dice.happens(self.grey),
            sigma=dice.uniform(*self.sigma),
            poisson_scale=dice.uniform(*self.poisson_scale),
            seed=dice.seeds(),
        )


@dataclass(frozen=True)
class Stage:
    """One pass of blur, resize, noise and JPEG; `jpeg` is the range of qualities."""

    blur: Blur
    resize: Resize
    noise: Noise
    jpeg: Range

    def __post_init__(self):
        _require(self.jpeg.low >= 1 and self.jpeg.high <= 100, f"jpeg must lie in 1..100, not {list(self.jpeg)}")

    def draw(self, dice: Dice) -> DrawnStage:
        """Draws one pass per image."""
        return DrawnStage(self.blur.draw(dice), self.resize.draw(dice), self.noise.draw(dice), dice.uniform(*self.jpeg))


@dataclass(frozen=True)
class FinalSinc:
    """The sinc filter at the end; `cutoff` is in units of pi."""

    probability: float
    size: Range
    cutoff: Range

    def __post_init__(self):
        _require_probability("probability", self.probability)
        _require_odd("size", self.size)
        _require_cutoff("cutoff", self.cutoff)

    def draw(self, dice: Dice) -> DrawnSinc:
        """Draws one filter per image."""
        return DrawnSinc(
            on=dice.happens(self.probability), size=dice.odd(self.size), cutoff=math.pi * dice.uniform(*self.cutoff)
        )


@dataclass(frozen=True)
class Final:
    """The last steps; `jpeg_first` is the probability that JPEG precedes the last resize and the sinc filter."""

    jpeg_first: float
    sinc: FinalSinc

    def __post_init__(self):
        _require_probability("jpeg_first", self.jpeg_first)

    def draw(self, dice: Dice) -> DrawnFinal:
        """Draws the last steps per image."""
        return DrawnFinal(mode=draw_mode(dice), jpeg_first=dice.happens(self.jpeg_first), sinc=self.sinc.draw(dice))


def draw_mode(dice: Dice) -> Tensor:
    """Draws one index into `ops.MODES`, the kinds of interpolation, per image; all are equally likely."""
    return dice.pick([1 / len(MODES)] * len(MODES))


def read_settings(kind: type[Settings], settings: Mapping[str, Any], where: str) -> Settings:
    """Builds the settings class `kind` from nested mappings.

    Args:
        kind: one of the classes above.
        settings: a mapping with the class's fields as keys.
        where: name of the mapping, for errors.

    Raises:
        ValueError: a key is missing or unknown, or a value is out of its range.
    """
    hints = get_type_hints(kind)
    _require(isinstance(settings, Mapping), f"{where}: expected a mapping, got {settings!r}")
    _require(
        set(settings) == set(hints),
        f"{where}: expected the keys {', '.join(hints)}; got {', '.join(map(str, settings))}",
    )
    values = {name: _read_value(hint, settings[name], f"{where}.{name}") for name, hint in hints.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _read_value(kind: type, value: Any, where: str) -> Any:
    if is_dataclass(kind):
        return read_settings(kind, value, where)
    if kind is Range:
        return _read_range(value, where)
    if kind in (int, float):
        _require(isinstance(value, int | float), f"{where}: expected a number, got {value!r}")
    return value


def _read_range(value: Sequence[float], where: str) -> Range:
    try:
        limits = Range(*value)
        _require(limits.low <= limits.high, "")
    except (TypeError, ValueError):
        raise ValueError(f"{where}: expected [low, high] with low <= high, got {value!r}") from None
    return limits


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_probability(name: str, value: float) -> None:
    _require(0 <= value <= 1, f"{name} must lie in 0..1, not {value:g}")


def _require_sum_of_one(name: str, values: Sequence[float]) -> None:
    _require(
        min(values) >= 0 and abs(sum(values) - 1) < 1e-6,
        f"{name} must be probabilities with the sum 1, not {sum(values):g}",
    )


def _require_odd(name: str, sizes: Range) -> None:
    _require(all(size % 2 == 1 and size > 0 for size in sizes), f"{name} must be odd and positive, not {list(sizes)}")


def _require_cutoff(name: str, cutoff: Range) -> None:
    _require(cutoff.low > 0 and cutoff.high <= 1, f"{name} must lie in 0..1 (units of pi), not {list(cutoff)}")


def _require_around_one(name: str, limits: Range) -> None:
    _require(limits.low <= 1 <= limits.high, f"{name} must contain 1, not {list(limits)}")
