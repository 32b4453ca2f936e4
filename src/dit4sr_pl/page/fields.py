"""The values that a visitor may send: each is checked on the server, whoever made the request. Needs no PyTorch."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dit4sr_pl.common.names import LONGEST, check_name

SEEDS = -(2**63), 2**63 - 1
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}

Field = Callable[[object, str], object]  # from a value and the field's name to the value that is used


@dataclass(frozen=True)
class Limits:
    """The bounds of a single request.

    Args:
        max_pixels: pixels of a result, also of the size at which it is restored.
        max_side: pixels along one side of it.
        max_steps: the sampler's steps.
        max_guidance: scale of guidance.
        max_text: characters of a caption or another prompt.
        max_evaluations: network evaluations of a tile, see `Restorer.tile_evaluations`.
        max_seconds: seconds on the device.

    Raises:
        ValueError: a limit is no number, or not above 0.
    """

    max_pixels: int
    max_side: int
    max_steps: int
    max_guidance: float
    max_text: int
    max_evaluations: int
    max_seconds: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name}={value}: must be a number above 0")

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises ValueError unless an image of this height and width may be made."""
        height, width = size
        if width * height > self.max_pixels or max(size) > self.max_side:
            raise ValueError(
                f"{width}x{height} pixels: at most {self.max_pixels} are restored, and {self.max_side} along a side"
            )


def number(low: float, high: float, whole: bool = False, limit: str = "") -> Field:
    """Returns the field of a number from `low` to `high`; `limit` names the setting that the bound comes from."""

    def check(value: object, name: str) -> float:
        wanted = f"{name}={shown(value)}: must be a {'whole ' if whole else ''}number from {low} to {high}{limit}"
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(wanted)
        if whole and value != int(value):
            raise ValueError(wanted)
        return int(value) if whole else value

    return check


def text(most: int) -> Field:
    """Returns the field of a text of up to `most` characters; none is an empty one."""

    def check(value: object, name: str) -> str:
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name}={shown(value)}: must be a text")
        if len(value or "") > most:
            raise ValueError(f"{name}: {len(value)} characters; at most {most} are read, the page's max_text")
        return value or ""

    return check


def choice(options: Sequence[str]) -> Field:
    """Returns the field of one of several texts."""

    def check(value: object, name: str) -> str:
        if not isinstance(value, str) or value not in options:
            raise ValueError(f"{name}={shown(value)}: choose one of {', '.join(options)}")
        return value

    return check


def fixed(only: object, reason: str) -> Field:
    """Returns the field of a value that cannot be another one, for a reason; programs may send it or nothing."""

    def check(value: object, name: str) -> object:
        if isinstance(value, bool) or value not in (None, only):
            raise ValueError(f"{name}={shown(value)}: must be {shown(only)}, since {reason}")
        return only

    return check


def upload(folder: Path) -> Field:
    """Returns the field of a file that was uploaded into `folder`; its value is Gradio's `FileData` without anything
    that a file does not need.
    """

    def check(value: object, name: str) -> dict:
        path = value.get("path") if isinstance(value, dict) else None
        if path is None:
            raise ValueError(f"{name}: give an image")
        if not isinstance(path, str) or "\0" in path or not is_within(path, folder) or not os.path.isfile(path):
            raise ValueError(f"{name}: is not on the server, or not any more; choose the file again")
        original = value.get("orig_name")
        if original is None or original == "":
            original = os.path.basename(path)
        if "/" in check_name(original, name):
            raise ValueError(f"{name}: {shown(original)} is not the name of a file")
        if len(os.fsencode(result_names(original)[0])) > LONGEST:
            raise ValueError(f"{name}: the name of its result is longer than {LONGEST} bytes; rename the file")
        return {"path": path, "orig_name": original, "meta": {"_type": "gradio.FileData"}}

    return check


def is_within(path: str, folder: Path) -> bool:
    """Returns whether a file lies below a folder, links followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def result_names(original: str) -> tuple[str, str]:
    """Returns the names of the enlarged and of the restored picture of a file; the second is what `restore` writes."""
    stem = Path(original).stem
    return f"{stem}.bicubic.png", f"{stem}.png"


def checked(fields: dict[str, Field], data: object) -> list:
    """Returns the values of a request's `data`.

    Args:
        fields: the fields by name, in the order in which they are sent.
        data: what was sent.

    Raises:
        ValueError: a value is missing, of another type, or out of its bounds.
    """
    if not isinstance(data, list) or len(data) != len(fields):
        raise ValueError(f"data: must be a list of {len(fields)} values: {', '.join(fields)}")
    return [check(value, name) for value, (name, check) in zip(data, fields.items(), strict=True)]


def shown(value: object) -> str:
    """Returns a value as a short text for a message."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    shortened = repr(value) if isinstance(value, str | bool | int | float) else type(value).__name__
    return shortened if len(shortened) < 60 else f"{shortened[:60]}..."


def bytes_of(size: int | str, name: str) -> int:
    """Returns the bytes of a size such as `50mb`, in powers of ten as Gradio reads it.

    Args:
        size: the size.
        name: the config key that gave it, for the message.

    Raises:
        ValueError: it is no size.
    """
    match = re.fullmatch(r"(\d+)\s*([a-z]*)", str(size).strip().lower())
    if match is None or match[2] not in UNITS or int(match[1]) == 0:
        raise ValueError(f"{name}={size}: must be a size such as 50mb or 2gb")
    return int(match[1]) * UNITS[match[2]]
