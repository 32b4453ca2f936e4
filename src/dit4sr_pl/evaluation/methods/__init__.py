"""Super-resolution systems behind one interface: named LR images in, named restored images four times as large out."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dit4sr_pl.common.read_ahead import in_batches


class LRImage(NamedTuple):
    """An LR image `(1, 3, h, w)` in 0..1, its name in the set and its caption, which may be empty."""

    name: str
    lr: Tensor
    caption: str


def same_size(lr_images: Iterable[LRImage], most: int) -> Iterator[tuple[list[str], Tensor, list[str]]]:
    """Yields names, LR images `(B, 3, h, w)` and captions of up to `most` images that follow one another."""
    for batch in in_batches(lr_images, most, lambda image: image.lr.shape):
        names, lr, captions = map(list, zip(*batch, strict=True))
        yield names, torch.cat(lr), captions


class Method(Protocol):
    """A super-resolution system; its scores are a row of the paper's tables.

    Attributes:
        label: name of the row, as the paper spells it.
        variant: name in `conf/ablation/`; empty for systems that are no variant of DiT4SR.
        weights_hash: hash of the weights; empty for a system without weights.
        network_config: how the network was made; empty for systems of other authors.
        identity: settings and files that the restored images depend on.
    """

    label: str
    variant: str
    weights_hash: str
    network_config: dict
    identity: dict

    def __call__(self, lr_images: Iterable[LRImage]) -> Iterator[tuple[str, Tensor]]:
        """Yields names and restored images `(3, 4h, 4w)` in 0..1, one by one or all at the end."""
        ...


class Finished:
    """A method whose images exist already."""

    variant = weights_hash = ""

    def __init__(self, label: str):
        self.label, self.identity, self.network_config = label, {}, {}

    def __call__(self, lr_images: Iterable[LRImage]) -> Iterator[tuple[str, Tensor]]:
        return iter(())
