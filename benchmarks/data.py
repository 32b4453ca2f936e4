"""Seconds until a data set of many photos stands, walked and from its manifest, and what the check before a run takes.

    python benchmarks/data.py [--photos 50000] [--folder FOLDER]

The photos are one small PNG again and again, a thousand to a folder as FFHQ has them, in a temporary folder or in
FOLDER, which may lie on the file system of interest (and is left there). Each figure is the first of its kind in this
process; the files' names and sizes are in the system's cache, since they were just written.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dit4sr_pl.data.datasets import TrainingCrops
from dit4sr_pl.data.manifest import MANIFEST, check_sizes
from dit4sr_pl.images.files import write_image
from dit4sr_pl.preparation.build_manifest import build_manifest


def write_photos(folder: Path, count: int) -> None:
    """Writes small photos with captions into nested folders."""
    write_image(folder / "00000/00000.png", torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)))
    content = (folder / "00000/00000.png").read_bytes()
    for number in range(count):
        path = folder / f"{number // 1000 * 1000:05}/{number:05}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def timed(what: str, run: Callable[[], object]) -> object:
    """Prints the seconds of one call and returns its result."""
    start = time.perf_counter()
    result = run()
    print(f"{what:45} {time.perf_counter() - start:8.3f} s")
    return result


def measure(folder: Path, count: int) -> None:
    """Measures a folder with and without a manifest."""
    write_photos(folder, count)
    (folder / MANIFEST).unlink(missing_ok=True)
    timed("data set, folder walked", lambda: TrainingCrops(folder, 32, 0))
    timed("manifest built, one process", lambda: build_manifest(folder))
    (photos,) = timed("data set, from its manifest", lambda: TrainingCrops(folder, 32, 0)).sets
    files = [photo.file for photo in photos.photos]
    timed("before the run: sizes of all files", lambda: check_sizes(folder, files, photos.sizes))
    timed("before the run: captions next to them counted", photos.captions.names)


if __name__ == "__main__":
    logging.getLogger("dit4sr_pl").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=50_000)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(arguments.folder or Path(temporary), arguments.photos)
