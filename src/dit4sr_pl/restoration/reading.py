"""Reads pictures in another process while the batch before them is restored.

Pillow's warnings about a file become its notes. Python records warnings for all threads of a process at once, so a
reading thread could be given those of another picture, and would hide those of the libraries that work meanwhile.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace

import torch

from dit4sr_pl.common.processes import START_METHOD, worker_processes
from dit4sr_pl.images.picture import Picture, check_colors
from dit4sr_pl.images.picture_files import read_picture
from dit4sr_pl.restoration.worklist import Entry

FAILURES = (ValueError, MemoryError, RuntimeError)  # PyTorch raises RuntimeError when memory is short

Read = tuple[Entry, "Picture | str"]  # an entry with its picture, or with the reason why there is none


@contextmanager
def reading(batches: Sequence[list[Entry]], first_frame: bool = False) -> Iterator[Iterator[list[Read]]]:
    """Yields an iterator over the batches' pictures.

    The first batch is read from now on, and every further one from when the iterator is asked for the one before it. A
    single batch is read when the iterator is asked for it, in this process.

    Args:
        batches: the entries of each batch.
        first_frame: see `read_picture`.
    """
    if len(batches) < 2:
        yield (list(zip(batch, read(batch, first_frame), strict=True)) for batch in batches)
        return
    with Reader(batches, first_frame) as reader:
        yield iter(reader)


class Reader:
    """Reads batches in another process, one batch ahead. A process that is killed while it reads does no harm.

    Args:
        batches: the entries of each batch.
        first_frame: see `read_picture`.
    """

    def __init__(self, batches: Sequence[list[Entry]], first_frame: bool):
        self.batches, self.first_frame = batches, first_frame

    def __enter__(self) -> "Reader":
        self.processes = worker_processes(1, START_METHOD)
        self.ahead = self.begin(self.batches[0])
        return self

    def __exit__(self, *_) -> None:
        self.processes.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[list[Read]]:
        for batch, following in zip(self.batches, [*self.batches[1:], []], strict=True):
            current, self.ahead = self.ahead, self.begin(following)
            try:
                pictures = unpacked(current)
            except BrokenProcessPool:
                pictures = [self.read_alone(entry) for entry in batch]
            yield list(zip(batch, pictures, strict=True))

    def begin(self, batch: list[Entry]) -> Future:
        """Returns the future pictures of a batch; if the process was killed, a new one reads them."""
        try:
            return self.processes.submit(read_packed, batch, self.first_frame)
        except BrokenProcessPool:
            self.processes = worker_processes(1, START_METHOD)
            return self.processes.submit(read_packed, batch, self.first_frame)

    def read_alone(self, entry: Entry) -> Picture | str:
        """Reads an entry of a batch whose process was killed, in a process of its own."""
        with worker_processes(1, START_METHOD) as processes:
            try:
                return unpacked(processes.submit(read_packed, [entry], self.first_frame))[0]
            except BrokenProcessPool:
                return f"{entry.source}: the process that read it was killed; its decoder failed, or memory is short"


def read(batch: list[Entry], first_frame: bool) -> list[Picture | str]:
    """Returns each entry's picture, or why it cannot be read."""
    pictures = []
    for entry in batch:
        try:
            picture = read_picture(entry.source, first_frame)
            check_colors(picture, entry.format)
            pictures.append(picture)
        except FAILURES as error:
            pictures.append(reason(entry, error))
    return pictures


def read_packed(batch: list[Entry], first_frame: bool) -> list[Picture | str]:
    """Does what `read` does, for another process: pixels are NumPy arrays, which need no shared memory to get there."""
    torch.set_num_threads(1)  # as in a DataLoader's workers: a forked process has no other threads
    pictures = read(batch, first_frame)
    return [read if isinstance(read, str) else with_planes(read, lambda plane: plane.numpy()) for read in pictures]


def unpacked(pictures: Future) -> list[Picture | str]:
    """Waits for the pictures of `read_packed` and returns them with tensors."""
    return [read if isinstance(read, str) else with_planes(read, torch.from_numpy) for read in pictures.result()]


def with_planes(picture: Picture, change) -> Picture:
    """Returns a picture whose colour and alpha passed `change`."""
    return replace(picture, color=change(picture.color), alpha=None if picture.alpha is None else change(picture.alpha))


def reason(entry: Entry, error: Exception) -> str:
    """Returns a line that names the file."""
    text = str(error).partition("\n")[0] or "out of memory"  # Python's MemoryError has no text
    return text if text.startswith(str(entry.source)) else f"{entry.source}: {text}"
