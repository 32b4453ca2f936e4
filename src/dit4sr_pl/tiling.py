"""Latents larger than the transformer's window: overlapping tiles, blended with Gaussian weights at every step."""

from collections.abc import Callable

import torch
from torch import Tensor

VARIANCE = 0.01  # of the squared tile size


def tiled(
    predict: Callable[[Tensor, Tensor, list[int]], Tensor],
    noisy: Tensor,
    lr: Tensor,
    tile: int,
    overlap: int,
    patch: int,
    tile_batch: int,
) -> Tensor:
    """Runs `predict` over tiles of `(B, C, H, W)` latents, several at once, and blends the results.

    One tile equals no tile: latents within `tile` go through in one piece.

    Args:
        predict: from noisy and LR latents of tiles `(N, C, h, w)`, and the image that each is of, to their velocity.
        tile: side of a tile in latents. overlap: of neighbours, at least. patch: the transformer's patch size.
        tile_batch: most tiles in one call, of one image or of several.
    """
    rows, columns = (starts(length, tile, overlap, patch) for length in noisy.shape[-2:])
    height, width = (min(tile, length) for length in noisy.shape[-2:])
    places = [(image, top, left) for image in range(len(noisy)) for top in rows for left in columns]
    weights = gaussian(height, noisy).unsqueeze(1) * gaussian(width, noisy)
    if len(rows) == len(columns) == 1:
        weights = torch.ones_like(weights)  # exact

    total, norm = torch.zeros_like(noisy), torch.zeros_like(noisy[:, :1])
    for begin in range(0, len(places), tile_batch):
        chosen = places[begin : begin + tile_batch]
        windows = [(image, ..., slice(top, top + height), slice(left, left + width)) for image, top, left in chosen]
        noisy_tiles, lr_tiles = (torch.stack([latents[window] for window in windows]) for latents in (noisy, lr))
        predicted = predict(noisy_tiles, lr_tiles, [image for image, _, _ in chosen])
        for window, velocity in zip(windows, predicted, strict=True):
            total[window] += weights * velocity
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
