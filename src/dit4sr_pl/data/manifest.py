"""A folder's manifest, the reading half: its photos, their sizes and hashes, and which of them are damaged.

The manifest is one parquet table, sorted by path as `find_images` sorts, so that a folder with a manifest and one
without give the same list. No PyTorch.
"""

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dit4sr_pl.common.names import check_names
from dit4sr_pl.images.files import find_images

MANIFEST = "manifest.parquet"
COMMAND = "python -m dit4sr_pl.prepare stage=manifest"


class Manifest(NamedTuple):
    """Good photos sorted by path, `files` below the folder with their `sizes` in bytes, and the paths of `damaged`
    ones.
    """

    files: list[str]
    sizes: list[int]
    damaged: list[str]


def list_photos(folder: Path) -> list[str]:
    """Returns the paths below `folder`, with `/`, of its images in the order of `find_images`; errors are its own."""
    return [path.relative_to(folder).as_posix() for path in find_images(folder)]


def read_manifest(path: Path | str, limit: int | None = None) -> Manifest:
    """Reads the first `limit` entries of a manifest, damaged ones included; None: all.

    Raises:
        FileNotFoundError: there is no such manifest.
        ValueError: the file is something else, or a path in it leaves the folder or occurs twice.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such manifest; run {COMMAND}")
    try:
        table = pq.read_table(path, columns=["path", "size", "error"]).slice(0, limit)
        files, sizes, errors = (table[name].to_pylist() for name in ("path", "size", "error"))
    except (pa.ArrowException, KeyError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # pyarrow's own OSErrors, of damaged files, have no number
            raise
        raise ValueError(f"{path}: not a manifest; move it elsewhere and run {COMMAND}") from None
    check_names(files, path)
    good = [error is None for error in errors]
    return Manifest(
        list(itertools.compress(files, good)),
        list(itertools.compress(sizes, good)),
        [file for file, error in zip(files, errors, strict=True) if error is not None],
    )


def check_sizes(folder: Path | str, files: Sequence[str], sizes: Sequence[int] | None) -> list[int]:
    """Returns the sizes in bytes of all `files` below `folder`; no file is opened.

    The sizes are read side by side, since every answer of a network file system takes long.

    Args:
        folder: the folder.
        files: paths below it.
        sizes: the sizes that they must have; None: any.

    Raises:
        ValueError: sizes are others, or files may not be read; the message names the first few.
    """
    with ThreadPoolExecutor(16) as pool:
        slices = (files[start : start + 500] for start in range(0, len(files), 500))
        read = pool.map(lambda names: [readable_size(f"{folder}/{name}") for name in names], slices)
        found = list(itertools.chain(*read))
    wrong, advice = "cannot be read", "bring them back, or remove what cannot be read"
    named = [f"{file} ({now})" for file, now in zip(files, found, strict=True) if isinstance(now, str)]
    if sizes is not None:
        wrong, advice = "differ from its manifest", f"restore them or run {COMMAND} again"
        named = [
            f"{file} ({now if isinstance(now, str) else f'{now} bytes, were {before}'})"
            for file, before, now in zip(files, sizes, found, strict=True)
            if now != before
        ]
    if named:
        first = ", ".join(named[:3]) + (", ..." if len(named) > 3 else "")
        raise ValueError(f"{folder}: {len(named)} of {len(files)} photos {wrong}: {first}; {advice}")
    return found


def readable_size(path: str) -> int | str:
    """Returns a file's size in bytes, or why it cannot be read."""
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return error.strerror
    return size if os.access(path, os.R_OK, effective_ids=True) else "may not be read"


def file_size(path: Path | str) -> int | None:
    """Returns a file's size in bytes; None if it does not exist or cannot be accessed."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None
