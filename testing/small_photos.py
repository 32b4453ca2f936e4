"""Photos of a few pixels a side."""

from pathlib import Path

import torch

from dit4sr_pl.common.randomness import generator
from dit4sr_pl.images.files import write_image
from dit4sr_pl.images.resize import enlarge


def write_photo(path: Path, height: int = 18, width: int = 13, seed: int = 0) -> None:
    """Writes a smooth photo."""
    picture = enlarge(torch.rand(1, 3, 3, 3, generator=generator("cpu", seed)), (height, width))
    write_image(path, picture[0])


def write_photos(folder: Path) -> Path:
    """Writes five photos of two sizes, `0.png` to `4.png`, and returns their folder."""
    for i in range(5):
        write_photo(folder / f"{i}.png", *((18, 13) if i % 2 else (16, 16)), seed=i)
    return folder
