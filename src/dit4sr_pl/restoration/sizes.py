"""Sizes of results. Imports nothing, so that commands check them at once."""

from fractions import Fraction
from math import isqrt
from typing import NamedTuple

SCALES = (1, 8)  # smallest and largest factor of the sides
TARGETS = ("size", "short_side", "megapixels")


class TargetSize(NamedTuple):
    """The size that results have, in place of a factor.

    Args:
        kind: `size` (the long side), `short_side` or `megapixels`.
        value: pixels, or millions of pixels.
    """

    kind: str
    value: float


def result_size(size: tuple[int, int], scale: float | TargetSize) -> tuple[int, int]:
    """Returns height and width of a picture's result.

    `scale` times the size, for the decimal number as it is written (2.7 x 5 is 13.5); halves round up. With a
    `TargetSize` both sides grow or shrink by one factor, and no side vanishes.

    Raises:
        ValueError: a `TargetSize` asks for more than 8 times the sides.
    """
    height, width = size
    if not isinstance(scale, TargetSize):
        factor = Fraction(str(scale))
    elif scale.kind == "megapixels":
        factor = Fraction(isqrt(int(Fraction(str(scale.value)) * 10**24) // (height * width)), 10**9)
    else:
        factor = Fraction(int(scale.value), max(size) if scale.kind == "size" else min(size))
    if isinstance(scale, TargetSize) and factor > SCALES[1]:
        raise ValueError(
            f"{scale.kind}={scale.value:g} is {float(factor):.1f} times its {width}x{height} pixels; at most "
            f"{SCALES[1]} times are restored"
        )
    height, width = (max(1, int(factor * length + Fraction(1, 2))) for length in size)
    return height, width
