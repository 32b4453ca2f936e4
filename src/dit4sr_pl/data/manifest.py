"""A folder's manifest: its photos, their sizes and hashes, and which of them are damaged.

One parquet table, sorted by path as `find_images` sorts: a folder with a manifest and one without give the same list.
While it is made, `<manifest>.parts/` beside it holds what is finished: `part-*.parquet` as they come, and
`<i>-of-<n>.parquet` for a shard that is through. A photo's shard follows from its path alone, so that shards agree
without talking to each other. No PyTorch here.
"""

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dit4sr_pl.images.files import find_images

MANIFEST = "manifest.parquet"
COMMAND = "python -m dit4sr_pl.prepare stage=manifest"


class Manifest(NamedTuple):
    """Good photos, sorted by path: `files` below the folder, `sizes` in bytes; and the `damaged` ones' paths."""

    files: list[str]
    sizes: list[int]
    damaged: list[str]


def list_photos(folder: Path) -> list[str]:
    """Paths below `folder`, with `/`, of its images in the order of `find_images`; errors as of `find_images`."""
    return [path.relative_to(folder).as_posix() for path in find_images(folder)]


def read_manifest(path: Path | str, limit: int | None = None) -> Manifest:
    """The first `limit` entries of a manifest (all if None), damaged ones counted.

    Raises `FileNotFoundError` if it is not there, `ValueError` for another file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such manifest; run {COMMAND}")
    try:
        table = pq.read_table(path, columns=["path", "size", "error"]).slice(0, limit)
        files, sizes, errors = (table[name].to_pylist() for name in ("path", "size", "error"))
    except (pa.ArrowException, KeyError):
        raise ValueError(f"{path}: not a manifest; remove it or run {COMMAND} again") from None
    good = [error is None for error in errors]
    return Manifest(
        list(itertools.compress(files, good)),
        list(itertools.compress(sizes, good)),
        [file for file, error in zip(files, errors, strict=True) if error is not None],
    )


def check_sizes(folder: Path | str, files: Sequence[str], sizes: Sequence[int]) -> None:
    """Raises `ValueError`, naming the first few, unless all `files` below `folder` have these sizes in bytes.

    Asks for each file's size and opens none; side by side, since each answer of a network file system takes long.
    """
    with ThreadPoolExecutor(16) as pool:
        slices = (files[start : start + 500] for start in range(0, len(files), 500))
        found = itertools.chain(*pool.map(lambda names: [file_size(f"{folder}/{name}") for name in names], slices))
        changed = [
            f"{file} ({'missing' if now is None else f'{now} bytes, were {before}'})"
            for file, before, now in zip(files, sizes, found, strict=True)
            if now != before
        ]
    if changed:
        first = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
        count = f"{len(changed)} of {len(files)} photos"
        raise ValueError(f"{folder}: {count} differ from its manifest: {first}; restore them or run {COMMAND} again")


def file_size(path: Path | str) -> int | None:
    """Bytes; None if there is no such file, or it cannot be looked at."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None
