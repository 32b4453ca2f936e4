"""A folder's manifest, the writing half: every photo is decoded once, its size and hash written down."""

import hashlib
import itertools
import multiprocessing
import os
import shutil
import signal
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from dit4sr_pl.data.manifest import MANIFEST, file_size, list_photos
from dit4sr_pl.images.files import check_image

FILES_PER_PART = 100  # what a kill costs at most, per process
SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),  # below the folder, with `/`
        ("size", pa.int64()),  # bytes; null if the file could not even be looked at
        ("hash", pa.string()),  # BLAKE2b of the bytes in hexadecimal, as `b2sum` prints it
        ("width", pa.int32()),  # pixels of the upright image
        ("height", pa.int32()),
        ("error", pa.string()),  # why the file cannot be read; null for a good one
    ]
)
Row = dict[str, Any]


class Built(NamedTuple):
    """What a call of `build_manifest` came to.

    `manifest` is the finished file, and `files` and `damaged` (path below the folder, reason) count all of it; or
    `manifest` is None while shards are missing, which `waiting_for` numbers, and the two count this shard.
    """

    manifest: Path | None
    files: int
    damaged: list[tuple[str, str]]
    waiting_for: list[int]


def build_manifest(
    folder: Path | str,
    output: Path | str | None = None,
    shard: tuple[int, int] = (1, 1),
    processes: int = 1,
    on_file: Callable[[int, int], None] = lambda done, total: None,
) -> Built:
    """Decode every image in `folder` and below it and write the manifest `output`, `folder/manifest.parquet` if None.

    Killed at any moment and called again it goes on where it was: at most `FILES_PER_PART` files are decoded twice.
    Called again it looks at new, changed (by size) and damaged files only, and forgets removed ones.

    `shard` is `(i, n)`, `i` from 1 to `n`: this call's share; shards may run at the same time, on several machines,
    and the one that finishes last joins the parts. `on_file(done, total)` is called in this process before the first
    file and after each one, with the numbers of files of this shard; files finished earlier are done.

    A damaged file is no error here: it is in the manifest with its reason, in `Built.damaged` on every call until it is
    mended or removed, and left out of training. Raises `FileNotFoundError` or `ValueError` as `find_images` does,
    and `ValueError` for a shard out of range and a file name that is not UTF-8.
    """
    folder, (number, count) = Path(folder), shard
    output = folder / MANIFEST if output is None else Path(output)
    if not 1 <= number <= count:
        raise ValueError(f"shard={number}/{count}: give shards as i/n, with i from 1 to n")
    files = [file for file in list_photos(folder) if zlib.crc32(_utf8(file)) % count == number - 1]
    parts = output.with_name(f"{output.name}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    finals = [parts / f"{i}-of-{count}.parquet" for i in range(1, count + 1)]
    if finals[number - 1].exists():  # this shard is not through any more, but what it found still counts
        finals[number - 1].replace(parts / f"part-{uuid4().hex}.parquet")

    known = _finished(output, parts)
    rows = [known[file] for file in files if file in known and known[file]["size"] == file_size(folder / file)]
    finished = {row["path"] for row in rows}
    left = [file for file in files if file not in finished]
    on_file(len(rows), len(files))
    with _mapping(processes) as mapping:
        found = mapping(partial(_inspect, folder), left)
        while part := list(_reported(itertools.islice(found, FILES_PER_PART), on_file, len(rows), len(files))):
            _write(part, parts / f"part-{uuid4().hex}.parquet", parts)
            rows += part
    _write(rows, finals[number - 1], parts)
    missing = [i for i, final in enumerate(finals, 1) if not final.exists()]
    if missing and finals[number - 1].exists():  # else another shard's process has joined them meanwhile
        return Built(None, len(rows), _damaged(rows), missing)
    rows = _join(finals, output, parts)
    return Built(output, len(rows), _damaged(rows), [])


def _inspect(folder: Path, file: str) -> Row:
    path = folder / file
    row = dict.fromkeys(SCHEMA.names) | {"path": file, "size": file_size(path)}
    try:
        with path.open("rb") as opened:
            row["hash"] = hashlib.file_digest(opened, "blake2b").hexdigest()
        row["width"], row["height"] = check_image(path)
    except OSError as error:
        row["error"] = error.strerror
    except ValueError as error:
        row["error"] = str(error).removeprefix(f"{path}: ")
    return row


def _reported(rows: Iterator[Row], on_file: Callable, done: int, total: int) -> Iterator[Row]:
    for number, row in enumerate(rows, done + 1):
        on_file(number, total)
        yield row


def _finished(output: Path, parts: Path) -> dict[str, Row]:
    """Rows by path of the manifest and of every part, but for damaged files, which are tried again."""
    rows = pq.read_table(output, schema=SCHEMA).to_pylist() if output.exists() else []
    rows += [row for part in parts.glob("[!.]*.parquet") for row in pq.read_table(part).to_pylist()]
    return {row["path"]: row for row in rows if row["error"] is None}


def _join(finals: list[Path], output: Path, parts: Path) -> list[Row]:
    """Write the manifest from all shards' rows, which are returned."""
    try:
        rows = sorted((row for final in finals for row in pq.read_table(final).to_pylist()), key=_place)
        _write(rows, output, parts)
        # The parts vanish at once, not file by file: another shard's process must never see half of them.
        joined = parts.with_suffix(".joined")
        shutil.rmtree(joined, ignore_errors=True)
        parts.rename(joined)
        shutil.rmtree(joined, ignore_errors=True)
        return rows
    except FileNotFoundError:  # another shard's process has joined them meanwhile
        return pq.read_table(output).to_pylist()


def _damaged(rows: list[Row]) -> list[tuple[str, str]]:
    return sorted((row["path"], row["error"]) for row in rows if row["error"] is not None)


def _place(row: Row) -> list[str]:
    return row["path"].split("/")  # as paths compare: folder by folder


def _write(rows: list[Row], path: Path, parts: Path) -> None:
    """Whole or not at all; unfinished files lie in `parts`, and go with it."""
    unfinished = parts / f".{uuid4().hex}"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), unfinished)
    unfinished.replace(path)


def _utf8(file: str) -> bytes:
    try:
        return file.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{os.fsencode(file)}: a file name that is not UTF-8; rename the file") from None


@contextmanager
def _mapping(processes: int) -> Iterator[Callable]:
    """`map`, or the same over several processes, which end with this one however it ends."""
    if processes == 1:
        yield map
        return
    # spawned: forking a process that has threads may hang
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _end_with_parent)
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered by the parent, in one line

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
