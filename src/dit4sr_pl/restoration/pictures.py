"""Restores files: pictures of one size go through the restorer in batches, and each keeps its metadata."""

import errno
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dit4sr_pl.images.picture import Picture, read_picture, write_picture
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.restoration.worklist import Entry, result_size

FAILURES = (ValueError, MemoryError, RuntimeError)  # PyTorch raises RuntimeError when memory is short
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # no other picture could be written either


class Outcome(NamedTuple):
    """The outcome of an entry: restored if there is no failure."""

    entry: Entry
    failure: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PictureRestorer:
    """Restores pictures.

    Args:
        restorer: function `(lr, size, captions, names, seed, on_step=...)` that returns SR images, such as a
            `Restorer`.
        scale: factor of both sides, see `result_size`.
        alpha: how alpha is enlarged: `bicubic`, or `network`, which sees it as a grey image without a prompt.
        seed: seed of the noise, together with each picture's name.
        first_frame: see `read_picture`.
    """

    restorer: Callable[..., Tensor]
    scale: float
    alpha: str
    seed: int
    first_frame: bool = False

    def run(self, batches: Iterable[list[Entry]], on_step: Callable[[int], None]) -> Iterator[Outcome]:
        """Restores and writes; yields one outcome per entry.

        Args:
            batches: entries of one size per batch.
            on_step: called after every network evaluation with the number of LR pixels that it covered.

        Raises:
            OSError: nothing more can be written.
        """
        for batch in batches:
            read = []
            for entry in batch:
                try:
                    read.append((entry, read_picture(entry.source, self.first_frame)))
                except FAILURES as error:
                    yield Outcome(entry, reason(entry, error))
            for size in {tuple(picture.color.shape[-2:]) for _, picture in read}:  # two when some lay on their side
                same = [(entry, picture) for entry, picture in read if picture.color.shape[-2:] == size]
                yield from self._write(same, on_step)

    def _write(self, read: list[tuple[Entry, Picture]], on_step: Callable[[int], None]) -> Iterator[Outcome]:
        entries, pictures = zip(*read, strict=True)
        try:
            names, prompts = [entry.name for entry in entries], [entry.prompt for entry in entries]
            restored = replace(self, seed=self.seed + entries[0].sample)(pictures, names, prompts, on_step)
        except FAILURES as error:
            yield from [Outcome(entry, reason(entry, error)) for entry in entries]
            return
        for entry, picture in zip(entries, restored, strict=True):
            try:
                write_picture(entry.target, picture)
                yield Outcome(entry, notes=picture.notes)
            except (*FAILURES, OSError) as error:
                if isinstance(error, OSError) and error.errno in FULL:
                    raise
                yield Outcome(entry, reason(entry, error))

    def __call__(
        self, pictures: Iterable[Picture], names: list[str], prompts: list[str], on_step: Callable[[int], None]
    ) -> list[Picture]:
        """Returns restored pictures of one size; a grey one is the mean of the three channels that the network
        returns.
        """
        size = result_size(pictures[0].color.shape[-2:], self.scale)
        sr = self._network([picture.color for picture in pictures], size, prompts, names, on_step)
        restored = []
        for picture, name, color in zip(pictures, names, sr, strict=True):
            alpha = picture.alpha
            if alpha is not None and self.alpha == "network":
                alpha = self._network([alpha], size, [""], [f"{name}/alpha"], on_step)[0].mean(0, keepdim=True)
            elif alpha is not None:
                alpha = enlarge(alpha[None], size)[0]
            grey = len(picture.color) == 1
            restored.append(replace(picture, color=color.mean(0, keepdim=True) if grey else color, alpha=alpha))
        return restored

    def _network(self, planes: list[Tensor], size: tuple[int, int], prompts, names, on_step) -> Tensor:
        lr = torch.stack([plane.expand(3, -1, -1) for plane in planes])
        pixels = lr.shape[0] * lr.shape[2] * lr.shape[3]
        step = lambda: on_step(pixels)  # noqa: E731
        return self.restorer(lr, size, prompts, names, self.seed, on_step=step)


def reason(entry: Entry, error: Exception) -> str:
    """Returns a line that names the file."""
    text = str(error).partition("\n")[0] or "out of memory"  # Python's MemoryError has no text
    return text if text.startswith(str(entry.source)) else f"{entry.source}: {text}"
