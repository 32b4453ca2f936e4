"""Latents larger than the transformer's window: overlapping tiles, blended with Gaussian weights at every step."""

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

VARIANCE = 0.01  # variance of the blending weights, in squared tile sizes

log = logging.getLogger(__name__)


class TileBatcher:
    """Number of tiles that pass the network at once: `most`, halved whenever they do not fit into the memory.

    Args:
        most: number of tiles to begin with.
        padded: whether smaller batches are filled up to the largest one so far with copies of their last tile. A
            compiled network would be compiled anew for their size.
    """

    def __init__(self, most: int, padded: bool = False):
        self.most, self.padded, self.warned = most, padded, False
        self.largest = 0

    def batches(self, predict: Callable[[Sequence], Tensor], places: Sequence) -> Iterator[tuple[Sequence, Tensor]]:
        """Yields as many places as fit, with the result of `predict` for them.

        Raises:
            ValueError: a single tile does not fit.
        """
        begin = 0
        while begin < len(places):
            chosen = places[begin : begin + self.most]
            try:
                predicted = predict(self.filled(chosen))[: len(chosen)]
            except torch.OutOfMemoryError:
                self.lower(len(chosen))
            else:
                yield chosen, predicted
                begin += len(chosen)

    def filled(self, chosen: Sequence) -> Sequence:
        """Returns the places of a batch, filled up if batches are padded."""
        if not self.padded:
            return chosen
        self.largest = max(min(self.largest, self.most), len(chosen))
        return [*chosen, *[chosen[-1]] * (self.largest - len(chosen))]

    def lower(self, tried: int) -> None:
        """Halves the number after `tried` tiles did not fit; warns once."""
        if tried == 1:
            raise ValueError(
                "a single tile does not fit into the device's memory; lower sampler.tile, take half precision "
                "(model.backbone.dtype=bfloat16) or offload=true"
            ) from None
        if not self.warned:
            log.warning(
                "%d tiles at once do not fit into the device's memory; half as many are used from now on; lower "
                "sampler.tile_memory",
                tried,
            )
        self.most, self.warned = tried // 2, True


def tiled(
    predict: Callable[[Tensor, Tensor, list[int]], Tensor],
    noisy: Tensor,
    lr: Tensor,
    tile: int,
    overlap: int,
    patch: int,
    batcher: TileBatcher,
) -> Tensor:
    """Runs `predict` over tiles of `(B, C, H, W)` latents, several at once, and blends the results.

    Latents that fit into one tile go through in one piece, exactly as without tiles.

    Args:
        predict: function from noisy and LR tiles `(N, C, h, w)` and the image that each belongs to, to their velocity.
        noisy: noisy latents, `(B, C, H, W)`.
        lr: LR latents of the same shape.
        tile: side of a tile in latents.
        overlap: smallest overlap of neighbours in latents.
        patch: the transformer's patch size.
        batcher: how many tiles, of one image or several, go through at once.
    """
    rows, columns = tile_starts(tuple(noisy.shape[-2:]), tile, overlap, patch)
    height, width = (min(tile, length) for length in noisy.shape[-2:])
    places = [(image, top, left) for image in range(len(noisy)) for top in rows for left in columns]
    weights = gaussian(height, noisy).unsqueeze(1) * gaussian(width, noisy)
    if len(rows) == len(columns) == 1:
        weights = torch.ones_like(weights)  # exact

    def window(place: tuple[int, int, int]) -> tuple:
        image, top, left = place
        return image, ..., slice(top, top + height), slice(left, left + width)

    def predict_at(chosen: Sequence) -> Tensor:
        tiles = (torch.stack([latents[window(place)] for place in chosen]) for latents in (noisy, lr))
        return predict(*tiles, [image for image, _, _ in chosen])

    total, norm = torch.zeros_like(noisy), torch.zeros_like(noisy[:, :1])
    for chosen, predicted in batcher.batches(predict_at, places):
        for place, velocity in zip(chosen, predicted, strict=True):
            total[window(place)] += weights * velocity
            norm[window(place)] += weights
    return total.div_(norm)


def tile_starts(size: tuple[int, int], tile: int, overlap: int, patch: int) -> tuple[list[int], list[int]]:
    """Returns the rows and the columns at which tiles start in latents of this height and width, see `tiled`."""
    rows, columns = (starts(length, tile, overlap, patch) for length in size)
    return rows, columns


def starts(length: int, tile: int, overlap: int, patch: int) -> list[int]:
    """Returns the starts of the fewest tiles that cover `length` and overlap by `overlap` or more, on the patch
    grid.
    """
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1) / patch) * patch for i in range(count)]


def gaussian(length: int, like: Tensor) -> Tensor:
    """Returns the blending weights along one side, centred on the tile."""
    position = (torch.arange(length, dtype=torch.float32, device=like.device) + 0.5) / length - 0.5
    return torch.exp(-position.square() / (2 * VARIANCE))
