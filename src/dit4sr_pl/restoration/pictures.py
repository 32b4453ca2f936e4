"""Restores files: pictures of one size go through the restorer in batches, and each keeps its metadata.

The next batch is read (`reading.py`) and results are written, in threads, while a batch is restored.
"""

import errno
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dit4sr_pl.images.picture import Picture
from dit4sr_pl.images.picture_files import write_picture
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.restoration.color import keep_colorless
from dit4sr_pl.restoration.reading import FAILURES, Read, reason
from dit4sr_pl.restoration.sizes import TargetSize, result_size
from dit4sr_pl.restoration.worklist import Entry

WRITERS = 2  # threads that compress and write; a thread takes less time for a picture than a GPU takes for the next
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # no other picture could be written either


Pending = tuple[Entry, Picture | None, "Future | str"]  # a picture that is being written, or why there is none


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
        scale: factor of both sides, or the size that results have; see `result_size`.
        alpha: how alpha is enlarged: `bicubic`, or `network`, which sees it as a grey image without a prompt.
        seed: seed of the noise, together with each picture's name.
        png_level: see `write_picture`.
        quality: see `write_picture`.
        colorize: whether pictures without colour take the colours that the network makes.
    """

    restorer: Callable[..., Tensor]
    scale: float | TargetSize
    alpha: str
    seed: int
    png_level: int | None = None
    quality: int | None = None
    colorize: bool = False

    def run(self, batches: Iterable[list[Read]], on_step: Callable[[int], None]) -> Iterator[Outcome]:
        """Restores pictures and writes the results; yields one outcome per entry, in the order of restoring.

        The results of at most two batches are in memory: one is written while the next one is restored. Of the pictures
        to restore there are those of one batch and, if they come from `reading`, of the next one.

        Args:
            batches: entries of one size per batch, as `reading` yields them.
            on_step: called after every network evaluation with the number of LR pixels that it covered.

        Raises:
            OSError: nothing more can be written.
        """
        pending: deque[Pending] = deque()
        with ThreadPoolExecutor(WRITERS, "writer") as writers:
            try:
                for batch in batches:
                    for same in by_size(batch, pending):
                        before = len(pending)
                        self._restore(same, on_step, pending, writers)
                        for _ in range(before):
                            yield written(pending.popleft())
            except KeyboardInterrupt:
                yield from map(written, pending)
                raise
            yield from map(written, pending)

    def _restore(
        self,
        read: list[tuple[Entry, Picture]],
        on_step: Callable[[int], None],
        pending: deque[Pending],
        writers: ThreadPoolExecutor,
    ) -> None:
        """Restores pictures of one size and hands them to the writers."""
        entries, pictures = zip(*read, strict=True)
        try:
            names, prompts = [entry.name for entry in entries], [entry.prompt for entry in entries]
            restored = replace(self, seed=self.seed + entries[0].sample)(pictures, names, prompts, on_step)
        except FAILURES as error:
            pending.extend((entry, None, reason(entry, error)) for entry in entries)
            return
        for entry, picture in zip(entries, restored, strict=True):
            options = {} if entry.format == "png" else {"format": entry.format, "quality": self.quality}
            future = writers.submit(write_picture, entry.target, picture, self.png_level, **options)
            pending.append((entry, picture, future))

    def __call__(
        self, pictures: Iterable[Picture], names: list[str], prompts: list[str], on_step: Callable[[int], None]
    ) -> list[Picture]:
        """Returns restored pictures of one size. Grey ones stay grey, and those without colour stay without."""
        size = result_size(pictures[0].color.shape[-2:], self.scale)
        colors = [under_clear(picture.color, picture.alpha).expand(3, -1, -1) for picture in pictures]
        sr = self._network(colors, size, prompts, names, on_step)
        if not self.colorize:
            keep_colorless(sr, torch.stack(colors))
        restored = []
        for picture, name, color in zip(pictures, names, sr, strict=True):
            alpha = picture.alpha
            if alpha is not None and self.alpha == "network":
                alpha = self._network([alpha], size, [""], [f"{name}/alpha"], on_step)[0].mean(0, keepdim=True)
            elif alpha is not None:
                alpha = enlarge(alpha[None], size)[0]
            grey = len(picture.color) == 1
            if grey and self.colorize and picture.icc is not None:
                picture = replace(picture, icc=None, notes=(*picture.notes, "its profile for grey is left out"))
            stays_grey = grey and not self.colorize
            restored.append(replace(picture, color=color[:1] if stays_grey else color, alpha=alpha))
        return restored

    def _network(self, planes: list[Tensor], size: tuple[int, int], prompts, names, on_step) -> Tensor:
        lr = torch.stack([plane.expand(3, -1, -1) for plane in planes])
        pixels = lr.shape[0] * lr.shape[2] * lr.shape[3]
        step = lambda: on_step(pixels)  # noqa: E731
        return self.restorer(lr, size, prompts, names, self.seed, on_step=step)


def written(pending: Pending) -> Outcome:
    """Waits until a picture is written and returns its outcome; raises OSError if no other could be written either."""
    entry, picture, result = pending
    if isinstance(result, str):
        return Outcome(entry, result)
    try:
        notes = result.result() or ()
    except (*FAILURES, OSError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        return Outcome(entry, reason(entry, error))
    return Outcome(entry, notes=(*picture.notes, *notes))


def by_size(batch: list[Read], pending: deque[Pending]) -> Iterator[list[tuple[Entry, Picture]]]:
    """Yields the pictures of a batch by size, which are two where some lay on their side; the others are pending."""
    pending.extend((entry, None, picture) for entry, picture in batch if isinstance(picture, str))
    sizes = {}
    for entry, picture in batch:
        if not isinstance(picture, str):
            sizes.setdefault(picture.color.shape[-2:], []).append((entry, picture))
    yield from sizes.values()


def under_clear(color: Tensor, alpha: Tensor | None) -> Tensor:
    """Returns an image whose clear pixels have the colours of the visible pixels around them.

    The colours of clear pixels are arbitrary, mostly black, and enlarging mixes them into the rims of what is visible.

    Args:
        color: `(C, H, W)` in 0..1.
        alpha: `(1, H, W)` in 0..1; None: all is opaque.
    """
    if alpha is None or bool((alpha > 0).all()) or not alpha.any():
        return color
    # Means of 2x2 pixels, weighted by alpha, fill what is clear; means of their means fill the rest.
    weight = F.avg_pool2d(alpha[None], 2, ceil_mode=True)
    mean = F.avg_pool2d((color * alpha)[None], 2, ceil_mode=True) / weight.clamp(min=1e-12)
    coarse = under_clear(mean[0], weight[0])
    filled = F.interpolate(coarse[None], size=color.shape[1:], mode="bilinear")[0]
    return torch.where(alpha > 0, color, filled)
