"""Bicubic enlargement, the simplest method of every table."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from dit4sr_pl.evaluation.benchmark_sets import SCALE
from dit4sr_pl.evaluation.methods import LRImage
from dit4sr_pl.images.resize import enlarge


class Bicubic:
    """Bicubic enlargement."""

    variant = weights_hash = ""

    def __init__(self, label: str):
        self.label, self.identity, self.network_config = label, {}, {}

    def __call__(self, lr_images: Iterable[LRImage]) -> Iterator[tuple[str, Tensor]]:
        for image in lr_images:
            height, width = image.lr.shape[-2:]
            yield image.name, enlarge(image.lr, (SCALE * height, SCALE * width))[0]
