"""Scoring that resumes after a kill. While a set is scored, its folder holds

    settings.json             the evaluation's identity; scores of anything else are refused
    parts/<i>-of-<n>.jsonl    a line per scored image of this shard
    images/                   restored images

and when the last image of the last shard is scored, the result's files replace the parts.
"""

import contextlib
import ctypes
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dit4sr_pl.common.files import LOCK, atomic_write, exclusive_lock, folder_lock, is_held
from dit4sr_pl.common.read_ahead import in_batches, read_ahead
from dit4sr_pl.common.run_identity import complete_parts, differences, flatten, upgraded
from dit4sr_pl.evaluation.benchmark_sets import Item
from dit4sr_pl.evaluation.methods import LRImage, Method
from dit4sr_pl.images.files import image_size, is_complete_png
from dit4sr_pl.images.picture import Picture
from dit4sr_pl.images.picture_files import write_picture
from dit4sr_pl.scores.metrics import ImageScore
from dit4sr_pl.scores.results import PICTURES, SCORES, read_scores

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
SETTINGS = "settings.json"
PIECES = "parts"  # the folder keeps this name, so that evaluations begun before 0.2 resume

Scores = dict[str, dict[str, float]]
Bar = Callable[[list], Iterable]


def claim(folder: Path, identity: dict, restores: bool) -> dict:
    """Writes the evaluation's identity into its folder, or checks it against the identity that is there.

    Args:
        folder: the evaluation's output folder.
        identity: see `evaluation_identity`.
        restores: whether this evaluation restores images itself.

    Returns:
        The identity; its metrics are those of this command and those that were measured in this folder before.

    Raises:
        ValueError: the folder holds scores, or restored images, of another evaluation.
    """
    path, identity = folder / SETTINGS, json.loads(json.dumps(identity))
    before = json.loads(path.read_text()) if path.exists() else None
    if before is not None:
        before = upgraded(before, identity)
        complete_parts(before, identity)
        identity["metrics"] = before["metrics"] | identity["metrics"]
        kept = before | {"metrics": identity["metrics"] | measured(before["metrics"])}
        other, detail = differences(kept, identity), difference_of_methods(kept, identity)
    else:
        unknown = (folder / SCORES).exists() or (restores and (folder / PICTURES).exists())
        other, detail = ["settings unknown"] if unknown else [], ""
    if other:
        raise ValueError(f"output={folder}: holds other scores ({', '.join(other)}){detail}; choose another folder")
    if before != identity:
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(identity, indent=1))
    return identity


def difference_of_methods(theirs: dict, ours: dict) -> str:
    """Returns the first setting in which the methods of two identities differ, as a text; empty: none."""
    before, now = (dict(flatten(identity["method"])) for identity in (theirs, ours))
    names = [name for name in differences(before, now) if name != "label"]
    return f": method.{names[0]} was {before.get(names[0])} and is {now.get(names[0])}" if names else ""


def measured(metrics: dict[str, dict]) -> dict[str, dict]:
    """Returns the metrics without those whose weights were missing, since these may come later."""
    return {name: options for name, options in metrics.items() if options["measured"]}


@contextlib.contextmanager
def working(folder: Path, shard: tuple[int, int]) -> Iterator[Path]:
    """Yields the file of a shard's scores; the folder is locked against all but the other shards."""
    piece = folder / PIECES / "{}-of-{}.jsonl".format(*shard)
    with folder_lock(folder, shard):
        piece.parent.mkdir(exist_ok=True)
        yield piece


def restore(items: list[Item], method: Method, bar: Bar, batch_size: int = 1, png_level: int | None = None) -> None:
    """Restores the images that do not exist yet.

    While a batch is restored, a thread reads the LR images of the next one, and another writes the results of the one
    before; so there are never more than two batches of results in memory.

    Args:
        items: images of the set.
        method: restores them.
        bar: wraps the images that are iterated.
        batch_size: number of images that the method takes at once; those of one size follow one another.
        png_level: see `write_picture`.
    """
    missing = [item for item in items if not is_complete_png(item.sr)]
    if batch_size > 1:
        missing.sort(key=lambda item: item.crop or image_size(item.lr))
    paths = {item.name: item.sr for item in missing}
    ahead = read_ahead(lambda item: item.read_lr(), missing, batch_size)
    lr_images = (LRImage(item.name, lr, item.caption) for item, lr in zip(bar(missing), ahead, strict=True))
    with ThreadPoolExecutor(1, "writer") as writer:
        pending = deque()
        for name, sr in method(lr_images) if missing else ():
            pending.append(writer.submit(write_picture, paths[name], Picture(sr.cpu()), png_level))
            if len(pending) > batch_size:
                pending.popleft().result()
        for last in pending:
            last.result()


def score(
    items: list[Item], metrics: dict[str, ImageScore], folder: Path, piece: Path, bar: Bar, batch_size: int = 1
) -> None:
    """Measures what is not measured yet; the scores of a batch are written before the next one is measured.

    Args:
        items: images of the set.
        metrics: the metrics by name.
        folder: the evaluation's output folder.
        piece: this task's file of scores.
        bar: wraps the images that are iterated.
        batch_size: number of images of one size that are measured at once, while the next ones are read.
    """
    with locked(folder):
        scored = read_pieces(folder)
    left = {item: [name for name in metrics if not has(scored, item, name, metrics[name].score)] for item in items}
    left = {item: names for item, names in left.items() if names}
    if not left:
        return
    ahead = read_ahead(lambda item: (item.read_sr(), item.read_hr()), left, batch_size)
    pairs = zip(bar(list(left)), ahead, strict=True)
    with journal(piece) as write:
        for batch in in_batches(pairs, batch_size, lambda pair: (left[pair[0]], pair[1][0].shape)):
            measured, images = zip(*batch, strict=True)
            sr, hr = (None if each[0] is None else torch.cat(each) for each in zip(*images, strict=True))
            columns = {name: scores_of(metrics[name], sr, hr) for name in left[measured[0]]}
            for item, *row in zip(measured, *columns.values(), strict=True):
                write({"image": item.name} | dict(zip(columns, row, strict=True)))


def has(scores: Scores, item: Item, metric: str, measurable: object) -> bool:
    """Returns whether an image was measured; nan stands for a metric whose weights were missing."""
    value = scores.get(item.name, {}).get(metric)
    return value is not None and not (measurable and math.isnan(value))


def tune_malloc() -> None:
    """Makes glibc keep freed memory.

    On a CPU pyiqa's SSIM allocates a gigabyte per image of 512x512, and getting its pages from the system anew takes
    several times as long as the computation.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def scores_of(metric: ImageScore, sr: torch.Tensor, hr: torch.Tensor | None) -> list[float]:
    """Returns the scores of images `(B, 3, H, W)` by one metric; one by one if the device's memory is too small."""
    device = metric.device
    try:
        return metric.each(sr.to(device), None if hr is None else hr.to(device)).tolist()
    except torch.OutOfMemoryError:
        if len(sr) == 1:
            raise
    pairs = zip(sr.split(1), [None] * len(sr) if hr is None else hr.split(1), strict=True)
    return [score for pair in pairs for score in scores_of(metric, *pair)]


def join(
    items: list[Item], metrics: dict[str, dict], folder: Path, own: Path, write: Callable[[Scores], None]
) -> list[str]:
    """Writes all scores in the order of `items` once the last one exists, and returns the names that are missing.

    Args:
        items: all images of the set, whose restored files must exist.
        metrics: options of every metric of images by its name.
        folder: the evaluation's output folder.
        own: this task's piece.
        write: writes the result.
    """
    with locked(folder):
        scores = read_pieces(folder)
        complete = lambda item: all(has(scores, item, name, metrics[name]["measured"]) for name in metrics)  # noqa: E731
        missing = [item.name for item in items if not (complete(item) and item.sr.exists())]
        if not missing:
            write({item.name: {name: scores[item.name][name] for name in metrics} for item in items})
            remove_pieces(folder, own, set(metrics))
    return missing


def remove_pieces(folder: Path, own: Path, metrics: set[str]) -> None:
    """Removes the pieces whose rows are in `scores.csv`, except those that another task may still write to."""
    for piece in sorted((folder / PIECES).glob("*.jsonl")):
        free = piece == own or not is_held(folder / f"{LOCK}-{piece.stem}")
        if free and {metric for row in rows(piece) for metric in row} <= {"image", *metrics}:
            piece.unlink()
    with contextlib.suppress(OSError):  # other tasks' pieces are in it
        (folder / PIECES).rmdir()


def read_pieces(folder: Path) -> Scores:
    """Returns all scores so far, finished or not."""
    scores = read_scores(folder / SCORES) if (folder / SCORES).exists() else {}
    for piece in sorted((folder / PIECES).glob("*.jsonl")):
        for row in rows(piece):
            scores.setdefault(row.pop("image"), {}).update(row)
    return scores


def rows(piece: Path) -> list[dict]:
    """Returns the rows of a piece; a last line that was cut off is none."""
    lines = piece.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


@contextlib.contextmanager
def journal(path: Path) -> Iterator[Callable[[dict], None]]:
    """Yields a function that appends rows to a file of lines, after its last complete line."""
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)

        def write(row: dict) -> None:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()

        yield write


def locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Returns the lock that a task holds while it reads or replaces what all tasks write."""
    return exclusive_lock(folder / f"{LOCK}-of-scores", wait=True)
