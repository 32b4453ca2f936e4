"""Latents larger than the transformer's window: overlapping tiles, blended with Gaussian weights at every step."""

from collections.abc import Callable

import torch
from torch import Tensor

VARIANCE = 0.01  # of the squared tile size


def tiled(
    predict: Callable[[Tensor, Tensor], Tensor], noisy: Tensor, lr: Tensor, tile: int, overlap: int, patch: int
) -> Tensor:
    """Runs `predict(noisy, lr)` over tiles of `(B, C, H, W)` latents and blends the results.

    One tile equals no tile: latents within `tile` go through in one piece.

    Args:
        predict: from noisy and LR latents of one tile to its velocity.
        tile: side of a tile in latents. overlap: of neighbours, at least. patch: the transformer's patch size.
    """
    rows, columns = starts(noisy.shape[-2], tile, overlap, patch), starts(noisy.shape[-1], tile, overlap, patch)
    if len(rows) == len(columns) == 1:
        return predict(noisy, lr)

    height, width = min(tile, noisy.shape[-2]), min(tile, noisy.shape[-1])
    weights = gaussian(height, noisy).unsqueeze(1) * gaussian(width, noisy)
    total, norm = torch.zeros_like(noisy), torch.zeros_like(noisy[:1, :1])
    for top in rows:
        for left in columns:
            window = (..., slice(top, top + height), slice(left, left + width))
            total[window] += weights * predict(noisy[window], lr[window])
            norm[window] += weights
    return total / norm


def starts(length: int, tile: int, overlap: int, patch: int) -> list[int]:
    """Starts of the fewest tiles that cover `length` and overlap by `overlap` or more, on the patch grid."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1) / patch) * patch for i in range(count)]


def gaussian(length: int, like: Tensor) -> Tensor:
    """Weights of one side, centred on the tile."""
    position = (torch.arange(length, dtype=torch.float32, device=like.device) + 0.5) / length - 0.5
    return torch.exp(-position.square() / (2 * VARIANCE))
