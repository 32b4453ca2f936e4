"""Scoring that goes on where it was killed. While a set is scored, its folder holds

    settings.json             what is scored and how; scores of anything else are refused
    parts/<i>-of-<n>.jsonl    a line per scored image of this shard
    images/                   restored images

and when the last image of the last shard is scored, the result's files take the place of the parts.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from uuid import uuid4

import torch

from dit4sr_pl.benchmark_sets import Item
from dit4sr_pl.files import replacing
from dit4sr_pl.images import write_image
from dit4sr_pl.methods import Method, Photo
from dit4sr_pl.metrics import ImageScore
from dit4sr_pl.results import SCORES, read_scores

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
SETTINGS, PARTS = "settings.json", "parts"

Scores = dict[str, dict[str, float]]
Bar = Callable[[list], Iterable]


def claim(folder: Path, settings: dict) -> None:
    """Writes down what this folder's scores are of.

    Raises:
        ValueError: it holds scores of something else.
    """
    path, settings = folder / SETTINGS, json.loads(json.dumps(settings))
    if path.exists():
        before = json.loads(path.read_text())
        other = sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key))
    else:
        other = ["settings unknown"] if (folder / SCORES).exists() else []
    if other:
        raise ValueError(f"output={folder}: holds other scores ({', '.join(other)}); choose another folder")
    if not path.exists():
        with replacing(path, uuid4().hex) as partial:
            partial.write_text(json.dumps(settings, indent=1))


def restore(items: list[Item], method: Method, bar: Bar) -> None:
    """Writes the restored images that are not there yet."""
    missing = [item for item in items if not item.sr.exists()]
    if not missing:
        return
    paths = {item.name: item.sr for item in missing}
    photos = (Photo(item.name, item.read_lr(), item.caption) for item in bar(missing))
    for name, sr in method(photos):
        write_image(paths[name], sr.cpu())


def score(items: list[Item], metrics: dict[str, ImageScore], folder: Path, shard: tuple[int, int], bar: Bar) -> None:
    """Scores the images that are not scored yet; each one's scores are on disk when the next one begins."""
    with locked(folder):
        scored = read_parts(folder)
    left = [item for item in items if item.name not in scored]
    if not left:
        return
    with journal(folder / PARTS / "{}-of-{}.jsonl".format(*shard)) as write:
        for item in bar(left):
            sr, hr = item.read_sr(), item.read_hr()
            write({"image": item.name} | {name: one_score(metric, sr, hr) for name, metric in metrics.items()})


def keep_memory() -> None:
    """Lets glibc keep what is freed: pyiqa's SSIM asks for a gigabyte per image of 512x512 on a CPU, and getting its
    pages from the system anew takes several times as long as the sums."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def one_score(metric: ImageScore, sr: torch.Tensor, hr: torch.Tensor | None) -> float:
    device = metric.device
    return metric.each(sr.to(device), None if hr is None else hr.to(device)).item()


def join(items: list[Item], folder: Path, write: Callable[[Scores], None]) -> list[str]:
    """Writes all scores in the order of `items` when the last one is there; the names that are still to come."""
    with locked(folder):
        scores = read_parts(folder)
        missing = [item.name for item in items if item.name not in scores]
        if not missing:
            write({item.name: scores[item.name] for item in items})
            shutil.rmtree(folder / PARTS, ignore_errors=True)
    return missing


def read_parts(folder: Path) -> Scores:
    """What has been scored, finished or not."""
    scores = read_scores(folder / SCORES) if (folder / SCORES).exists() else {}
    for part in sorted((folder / PARTS).glob("*.jsonl")):
        for line in part.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # else it was cut off
                row = json.loads(line)
                scores[row.pop("image")] = row
    return scores


@contextlib.contextmanager
def journal(path: Path) -> Iterator[Callable[[dict], None]]:
    """Adds rows to a file of lines, after its last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)

        def write(row: dict) -> None:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()

        yield write


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time; a killed one lets go."""
    descriptor = os.open(folder / SETTINGS, os.O_RDWR)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
