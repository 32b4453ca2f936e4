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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dit4sr_pl.common.files import LOCK, atomic_write, exclusive_lock, folder_lock, is_held
from dit4sr_pl.common.run_identity import differences, upgraded
from dit4sr_pl.evaluation.benchmark_sets import Item
from dit4sr_pl.evaluation.methods import LRImage, Method
from dit4sr_pl.images.files import is_complete_png, write_image
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
        identity["metrics"] = before["metrics"] | identity["metrics"]
        kept = before | {"metrics": identity["metrics"] | measured(before["metrics"])}
        other = differences(kept, identity)
    else:
        unknown = (folder / SCORES).exists() or (restores and (folder / PICTURES).exists())
        other = ["settings unknown"] if unknown else []
    if other:
        raise ValueError(f"output={folder}: holds other scores ({', '.join(other)}); choose another folder")
    if before != identity:
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(identity, indent=1))
    return identity


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


def restore(items: list[Item], method: Method, bar: Bar) -> None:
    """Restores the images that do not exist yet; each is written in a thread while the next one is restored."""
    missing = [item for item in items if not is_complete_png(item.sr)]
    if not missing:
        return
    paths = {item.name: item.sr for item in missing}
    lr_images = (LRImage(item.name, item.read_lr(), item.caption) for item in bar(missing))
    with ThreadPoolExecutor(1, "writer") as writer:
        pending = []
        for name, sr in method(lr_images):
            for before in pending:
                before.result()
            pending = [writer.submit(write_image, paths[name], sr.cpu())]
        for last in pending:
            last.result()


def score(items: list[Item], metrics: dict[str, ImageScore], folder: Path, piece: Path, bar: Bar) -> None:
    """Measures what is not measured yet; an image's scores are written before the next one begins."""
    with locked(folder):
        scored = read_pieces(folder)
    left = {item: [name for name in metrics if not has(scored, item, name, metrics[name].score)] for item in items}
    left = {item: names for item, names in left.items() if names}
    if not left:
        return
    with journal(piece) as write:
        for item in bar(list(left)):
            sr, hr = item.read_sr(), item.read_hr()
            write({"image": item.name} | {name: one_score(metrics[name], sr, hr) for name in left[item]})


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


def one_score(metric: ImageScore, sr: torch.Tensor, hr: torch.Tensor | None) -> float:
    """Returns one image's score by one metric."""
    device = metric.device
    return metric.each(sr.to(device), None if hr is None else hr.to(device)).item()


def join(
    items: list[Item], metrics: dict[str, dict], folder: Path, own: Path, write: Callable[[Scores], None]
) -> list[str]:
    """Writes all scores in the order of `items` once the last one exists, and returns the names that are missing.

    Args:
        items: all images of the set.
        metrics: options of every metric by its name.
        folder: the evaluation's output folder.
        own: this task's piece.
        write: writes the result.
    """
    with locked(folder):
        scores = read_pieces(folder)
        complete = lambda item: all(has(scores, item, name, metrics[name]["measured"]) for name in metrics)  # noqa: E731
        missing = [item.name for item in items if not complete(item)]
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
