"""The tensors that other streams read of the LR stream, kept from one evaluation for others: they change slowly."""

import torch
from torch import Tensor

Kept = dict[str, Tensor]  # of one block: LR keys and values of each attention, and the injection


class LRCache:
    """LR keys, LR values and injections of every block, from one forward pass for others.

    A network that is given an empty cache fills it. Given a full one, it reads it, and its LR stream does not run: the
    pass costs as much as one of SD3's transformer with more keys to attend to. A cache serves any timestep and prompt,
    for the same LR latents.

    Args:
        blocks: what each block keeps, by name.
    """

    def __init__(self, blocks: list[Kept]):
        self.blocks = blocks

    @classmethod
    def empty(cls, blocks: int) -> "LRCache":
        """Returns a cache to be filled, for a network of so many blocks."""
        return cls([{} for _ in range(blocks)])

    @property
    def full(self) -> bool:
        """Whether a pass has filled the cache."""
        return bool(self.blocks[0])

    def split(self, tiles: int) -> list["LRCache"]:
        """Returns a cache per tile; a pass takes all tiles of the first condition, then all of the next."""
        return [
            LRCache([{name: tensor[tile::tiles] for name, tensor in kept.items()} for kept in self.blocks])
            for tile in range(tiles)
        ]

    @classmethod
    def join(cls, caches: list["LRCache"]) -> "LRCache":
        """Returns one cache for a pass of several tiles, each of which has its own; it is the inverse of `split`."""
        if len(caches) == 1:
            return caches[0]
        return cls(
            [
                {name: torch.stack([kept[name] for kept in same], dim=1).flatten(0, 1) for name in same[0]}
                for same in zip(*(cache.blocks for cache in caches), strict=True)
            ]
        )


def keep(kept: Kept | None, name: str, fresh: Tensor) -> Tensor:
    """Returns LR tensors `(B, ..., K, D)` and keeps them; returns those that were kept where `fresh` has no tokens.

    Args:
        kept: what a block keeps; None: nothing.
        name: name of the tensor in it.
        fresh: the tensor of this pass; K is 0 where the LR stream does not run.
    """
    if kept is None:
        return fresh
    if fresh.shape[-2]:
        kept[name] = fresh
    return kept[name]
