"""Images that a Python caller gives, as one batch: Pillow images, files, arrays and tensors, alone or in a list.

Arrays and tensors are taken as diffusers' pipelines take them.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dit4sr_pl.images.files import read_image, rgb_pixels

Images = Image.Image | np.ndarray | Tensor | str | os.PathLike
TAKEN = (
    "give a Pillow image, a path, an array (h, w, 3) or (B, h, w, 3), a tensor (3, h, w) or (B, 3, h, w), or a list of "
    "such; grey has one channel in place of three"
)


def to_batch(image: Images | list[Images]) -> Tensor:
    """Returns images as float32 `(B, 3, h, w)` in 0..1; grey is repeated over the channels.

    Raises:
        ValueError: there is none, it is something else, its numbers are out of their range, or sizes differ.
    """
    given = list(image) if isinstance(image, list | tuple) else [image]
    if not given:
        raise ValueError(f"image: an empty list; {TAKEN}")
    batches = [batch_of(each) for each in given]
    if len({batch.shape[-2:] for batch in batches}) > 1:
        sizes = ", ".join(f"{batch.shape[3]}x{batch.shape[2]}" for batch in batches)
        raise ValueError(f"image: one size per call, got {sizes}; restore them one by one")
    return torch.cat(batches)


def batch_of(image: Any) -> Tensor:
    """Returns one argument as a batch; errors are those of `to_batch`."""
    if isinstance(image, Image.Image):
        return rgb_pixels(image)[None] / 255
    if isinstance(image, str | os.PathLike):
        return read_image(Path(image))[None] / 255
    if not isinstance(image, np.ndarray | Tensor):
        raise ValueError(f"image: {type(image).__name__}; {TAKEN}")
    values, shape = image, tuple(image.shape)
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "buif":
            raise ValueError(f"image: an array of {image.dtype}; give floats in 0..1, or uint8")
        values = torch.from_numpy(np.array(image, order="C"))  # a copy, since flipped and read-only ones are no tensors
        values = values[..., None] if values.ndim == 2 else values
        values = values.movedim(-1, -3) if values.ndim > 2 else values
    values = values[None] if values.ndim == 2 else values
    values = values[None] if values.ndim == 3 else values
    if values.ndim != 4 or values.shape[1] not in (1, 3) or 0 in values.shape:
        raise ValueError(f"image: {'an array' if isinstance(image, np.ndarray) else 'a tensor'} of {shape}; {TAKEN}")
    return levels(values.detach()).expand(-1, 3, -1, -1)


def levels(values: Tensor) -> Tensor:
    """Returns floats in 0..1 of floats, of whole numbers of 8 or 16 bits without sign, or of booleans.

    Raises:
        ValueError: the numbers are of another kind or out of their range.
    """
    if values.dtype in (torch.uint8, torch.uint16):
        return values.float() / torch.iinfo(values.dtype).max
    if values.dtype != torch.bool and not values.is_floating_point():
        raise ValueError(f"image: whole numbers of {values.dtype}; give floats in 0..1, or uint8")
    values = values.float()
    if not values.isfinite().all():
        raise ValueError("image: holds values that are not finite; give floats in 0..1, or uint8")
    if values.min() < 0 or values.max() > 1:
        low, high = values.min().item(), values.max().item()
        raise ValueError(f"image: floats from {low:g} to {high:g}; they must be in 0..1, or give uint8")
    return values


def image_names(image: Images | list[Images], count: int) -> list[str]:
    """Returns the names of a batch's images: their files' names without suffix if all are files, else their places."""
    given = list(image) if isinstance(image, list | tuple) else [image]
    if all(isinstance(each, str | os.PathLike) for each in given):
        return [Path(each).stem for each in given]
    return [str(place) for place in range(count)]
