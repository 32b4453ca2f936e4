"""Bicubic resizing of images, at once or window by window."""

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor


def enlarge(lr: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarges images `(B, 3, h, w)` to `(B, 3, *size)` by Pillow's bicubic kernel (a = -0.5), clamped to 0..1."""
    return F.interpolate(lr, size=size, mode="bicubic", antialias=True).clamp_(0, 1)


class LazyEnlargement:
    """The images that `enlarge` would return, computed window by window: `images[..., rows, columns]`, as for a tensor.

    Args:
        lr: `(B, 3, h, w)` in 0..1, which may be lazy, too.
        size: height and width of the enlarged images.
        extent: height and width including reflections at the bottom and the right, which repeat as needed; None:
            `size`.
    """

    def __init__(self, lr: "Tensor | LazyEnlargement", size: tuple[int, int], extent: tuple[int, int] | None = None):
        self.lr, self.size = lr, size
        self.shape = torch.Size([*lr.shape[:2], *(extent or size)])

    def __getitem__(self, window: tuple) -> Tensor:
        needed, mixed = [], []
        for dim, wanted in zip((2, 3), window[1:], strict=True):
            position = torch.arange(*wanted.indices(self.shape[dim]), dtype=torch.float64)
            there_and_back = max(2 * (self.size[dim - 2] - 1), 1)
            position = torch.minimum(position % there_and_back, -position % there_and_back)
            index, weights = bicubic_taps(position, self.lr.shape[dim], self.size[dim - 2])
            first, last = int(index.min()), int(index.max())
            needed.append(slice(first, last + 1))  # no tensor becomes as wide as the whole image
            mixed.append((dim, index - first, weights))
        images = self.lr[..., needed[0], needed[1]]
        for dim, index, weights in mixed:
            images = weighted(images, dim, index.to(images.device), weights.to(images))
        return images.clamp_(0, 1)


def bicubic_taps(position: Tensor, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Returns the pixels that bicubic resizing mixes and their weights, each `(taps, positions)`.

    Args:
        position: positions in the resized image.
        count: number of pixels before resizing.
        length: number of pixels after resizing.
    """
    scale = count / length
    width = max(scale, 1.0)  # the kernel widens where images become smaller
    center = (position + 0.5) * scale
    index = (center - 2 * width + 0.5).floor() + torch.arange(ceil(4 * width)).unsqueeze(1)
    x = (index + 0.5 - center).abs() / width
    weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)
    weights = weights.where((x < 2) & (index >= 0) & (index < count), 0)
    return index.clamp(0, count - 1).long(), weights / weights.sum(0)


def weighted(images: Tensor, dim: int, index: Tensor, weights: Tensor) -> Tensor:
    """Returns the weighted sum of the pixels at `index` along a dimension."""
    shape = [-1 if each == dim else 1 for each in range(images.ndim)]
    return sum(images.index_select(dim, i) * weight.view(shape) for i, weight in zip(index, weights, strict=True))
