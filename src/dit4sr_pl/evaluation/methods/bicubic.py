"""Bicubic enlargement, the floor of every table."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from dit4sr_pl.evaluation.benchmark_sets import SCALE
from dit4sr_pl.evaluation.methods import Photo
from dit4sr_pl.images.resize import enlarge


class Bicubic:
    variant = checkpoint = ""

    def __init__(self, label: str):
        self.label, self.settings = label, {}

    def __call__(self, photos: Iterable[Photo]) -> Iterator[tuple[str, Tensor]]:
        for photo in photos:
            height, width = photo.lr.shape[-2:]
            yield photo.name, enlarge(photo.lr, (SCALE * height, SCALE * width))[0]
