"""Latents larger than the transformer's window: tiles that overlap and are blended, or that move at every step."""

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

TILINGS = ("overlapping", "shifted")
VARIANCE = 0.01  # variance of the blending weights, in squared tile sizes
NARROWEST = 4  # a shifted tile that the edge cuts has at least this fraction of a side

Span = tuple[int, int]
Place = tuple[int, Span, Span]  # image, first and last row + 1, first and last column + 1

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
    predict: Callable[[Tensor, Tensor, list[Place]], Tensor],
    noisy: Tensor,
    lr: Tensor,
    tile: int,
    overlap: int,
    patch: int,
    batcher: TileBatcher,
    shift: tuple[float, float] | None = None,
) -> Tensor:
    """Runs `predict` over tiles of `(B, C, H, W)` latents, several at once, and blends the results.

    Latents that fit into one tile go through in one piece, exactly as without tiles.

    Args:
        predict: function from noisy and LR tiles `(N, C, h, w)` and the place of each, to their velocity.
        noisy: noisy latents, `(B, C, H, W)`.
        lr: LR latents of the same shape.
        tile: side of a tile in latents.
        overlap: smallest overlap of neighbours in latents.
        patch: the transformer's patch size.
        batcher: how many tiles, of one image or several, go through at once.
        shift: rows and columns by which tiles without overlap are shifted, see `shifted`; None: tiles overlap.
    """
    rows, columns = spans(tuple(noisy.shape[-2:]), tile, overlap, patch, shift)
    weigh = gaussian if shift is None and len(rows) * len(columns) > 1 else torch.ones
    places = [(image, top, left) for image in range(len(noisy)) for top in rows for left in columns]

    def predict_at(chosen: Sequence[Place]) -> Tensor:
        tiles = (torch.stack([latents[window(place)] for place in chosen]) for latents in (noisy, lr))
        return predict(*tiles, list(chosen))

    total, norm = torch.zeros_like(noisy), torch.zeros_like(noisy[:, :1])
    for height, width in dict.fromkeys(map(size_of, places)):
        weights = weigh(height, device=noisy.device).unsqueeze(1) * weigh(width, device=noisy.device)
        same = [place for place in places if size_of(place) == (height, width)]
        for chosen, predicted in batcher.batches(predict_at, same):
            for place, velocity in zip(chosen, predicted, strict=True):
                total[window(place)] += weights * velocity
                norm[window(place)] += weights
    return total.div_(norm)


def spans(
    size: tuple[int, int], tile: int, overlap: int, patch: int, shift: tuple[float, float] | None
) -> tuple[list[Span], list[Span]]:
    """Returns the rows and the columns that tiles have in latents of this height and width, see `tiled`."""
    if shift is None:
        rows, columns = (overlapping(length, tile, overlap, patch) for length in size)
    else:
        rows, columns = (shifted(length, share, tile, patch) for length, share in zip(size, shift, strict=True))
    return rows, columns


def window(place: Place) -> tuple:
    """Returns the index of a tile in latents `(B, C, H, W)`."""
    image, rows, columns = place
    return image, ..., slice(*rows), slice(*columns)


def size_of(place: Place) -> tuple[int, int]:
    """Returns height and width of a tile."""
    _, (top, bottom), (left, right) = place
    return bottom - top, right - left


def overlapping(length: int, tile: int, overlap: int, patch: int) -> list[Span]:
    """Returns the fewest tiles that cover `length` and overlap by `overlap` or more, on the patch grid."""
    if length <= tile:
        return [(0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    starts = [round(i * (length - tile) / (count - 1) / patch) * patch for i in range(count)]
    return [(start, start + tile) for start in starts]


def shifted(length: int, shift: float, tile: int, patch: int) -> list[Span]:
    """Returns tiles side by side, on the patch grid, that begin at a share `shift` in 0..1 of a tile.

    The edges cut the first and the last tile. What is left of them is extended to a quarter of a tile.
    """
    if length <= tile:
        return [(0, length)]
    cuts = [0, *range(round(shift * tile / patch) * patch, length, tile), length]
    least = -(-tile // NARROWEST // patch) * patch
    spans = [(start, stop) for start, stop in zip(cuts, cuts[1:], strict=False) if stop > start]
    return [(min(start, length - least), max(stop, least)) for start, stop in spans]


def gaussian(length: int, device: torch.device) -> Tensor:
    """Returns the blending weights along one side, centred on the tile."""
    position = (torch.arange(length, dtype=torch.float32, device=device) + 0.5) / length - 0.5
    return torch.exp(-position.square() / (2 * VARIANCE))
