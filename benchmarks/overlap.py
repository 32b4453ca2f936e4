"""Compares restoring a folder with and without reading ahead and writing behind.

    python benchmarks/overlap.py [--images 12] [--side 512] [--network 0.1] [--level 1]

*One after another*: a picture is read, restored and written before the next one. *Written behind*: threads write while
the next one is read and restored. *Read ahead*, as `restore` works: another process reads the next one meanwhile, too.

A pause of `--network` seconds per image stands in for a GPU, which leaves the CPU free. Pictures are random and smooth.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from dit4sr_pl.common.randomness import generator
from dit4sr_pl.images.files import write_image
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.restoration.pictures import PictureRestorer
from dit4sr_pl.restoration.reading import Read, reading
from dit4sr_pl.restoration.worklist import Entry, batches, make_worklist


class Inline:
    """An executor that runs what it is given at once, in the place of threads."""

    def __init__(self, *_):
        pass

    def __enter__(self) -> "Inline":
        return self

    def __exit__(self, *_) -> None:
        pass

    def submit(self, function, *arguments) -> Future:
        """Returns a finished future."""
        future = Future()
        future.set_result(function(*arguments))
        return future


def main() -> None:
    """Prints seconds per picture of each way, and their ratio to the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--side", type=int, default=512, help="of a result, pixels")
    parser.add_argument("--network", type=float, default=0.1, help="seconds per image")
    parser.add_argument("--level", type=int, default=None, help="png_level")
    args = parser.parse_args()

    def restorer(lr: Tensor, size: tuple[int, int], *_, **__) -> Tensor:
        time.sleep(args.network * len(lr))
        return enlarge(lr, size)

    seconds = {}
    with tempfile.TemporaryDirectory() as name:
        folder, side = Path(name), args.side // 4
        for index in range(args.images):
            small = torch.rand(1, 3, side // 4, side // 4, generator=generator("cpu", index))
            write_image(folder / "in" / f"{index}.png", enlarge(small, (side, side))[0])
        restore = PictureRestorer(restorer, 4, "bicubic", 0, png_level=args.level)
        with patch("dit4sr_pl.restoration.pictures.ThreadPoolExecutor", Inline):
            seconds["one after another"] = timed(restore, folder, "inline", one_by_one)
        seconds["written behind"] = timed(restore, folder, "behind", one_by_one)
        seconds["read ahead"] = timed(restore, folder, "ahead", reading)
    print(f"{'':20s}{'s per picture':>16s}{'ratio':>8s}")
    for way, each in seconds.items():
        print(f"{way:20s}{each / args.images:16.3f}{each / seconds['one after another']:8.2f}")


@contextmanager
def one_by_one(in_batches: list[list[Entry]]) -> Iterator[Iterator[list[Read]]]:
    """Yields an iterator that reads a batch when it is asked for it."""

    def read() -> Iterator[list[Read]]:
        for batch in in_batches:
            with reading([batch]) as pictures:
                yield from pictures

    yield read()


def timed(restore: PictureRestorer, folder: Path, output: str, read: Callable) -> float:
    """Returns the seconds of restoring all pictures."""
    entries = make_worklist(folder / "in", folder / output).entries
    began = time.perf_counter()
    with read(list(batches(entries, 1))) as pictures:
        outcomes = list(restore.run(pictures, lambda _: None))
    assert not [outcome.failure for outcome in outcomes if outcome.failure]
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
