"""A folder's manifest, the writing half: every photo is decoded once; its size and hash are recorded. No PyTorch."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dit4sr_pl.common.files import atomic_write
from dit4sr_pl.common.names import check_names
from dit4sr_pl.common.processes import worker_processes
from dit4sr_pl.data.manifest import MANIFEST, file_size, list_photos, read_manifest
from dit4sr_pl.images.files import NOT_NOW, UnreadableNow, check_image

SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),  # below the folder, with `/`
        ("size", pa.int64()),  # bytes; null if the file could not be opened
        ("hash", pa.string()),  # BLAKE2b of the bytes in hexadecimal, as `b2sum` prints it
        ("width", pa.int32()),  # pixels of the upright image
        ("height", pa.int32()),
        ("error", pa.string()),  # why the file cannot be read; null for a good one
    ]
)

Row = dict[str, Any]


class Built(NamedTuple):
    """A finished manifest: its file, the number of photos, and (path below the folder, reason) of damaged ones."""

    manifest: Path
    files: int
    damaged: list[tuple[str, str]]


def build_manifest(
    folder: Path | str,
    output: Path | str | None = None,
    processes: int = 1,
    on_file: Callable[[int, int], None] = lambda done, total: None,
) -> Built:
    """Decodes every image in `folder` and below it and writes the manifest, atomically.

    A second call decodes new, changed (by size) and damaged files only, and forgets removed ones. A killed call leaves
    the former manifest as it was. A damaged file is no error: its row holds the reason, and training leaves it out.

    Args:
        folder: folder of photos, at any depth.
        output: path of the manifest; None: `manifest.parquet` in the folder.
        processes: number of processes that decode.
        on_file: called with the number of files that are done and of all, before the first file and after each.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds no image, a file name cannot be used, or `output` is a file of another kind.
    """
    folder = Path(folder)
    output = folder / MANIFEST if output is None else Path(output)
    files = list_photos(folder)
    check_names(files, folder)
    rows = {file: row for file, row in _known(output).items() if row["size"] == file_size(folder / file)}
    left = [file for file in files if file not in rows]
    on_file(len(files) - len(left), len(files))
    with _mapping(processes) as mapping:
        for done, row in enumerate(mapping(partial(_inspect, folder), left), len(files) - len(left) + 1):
            rows[row["path"]] = row
            on_file(done, len(files))
    table = pa.Table.from_pylist([rows[file] for file in files], schema=SCHEMA)
    with atomic_write(output) as partial_file:
        pq.write_table(table, partial_file)
    damaged = sorted((file, rows[file]["error"]) for file in files if rows[file]["error"] is not None)
    return Built(output, len(files), damaged)


def _known(output: Path) -> dict[str, Row]:
    """Returns the rows of an earlier manifest by path, without damaged files, which are tried again.

    Raises:
        ValueError: the file is something else, which must not be overwritten.
    """
    if not output.exists():
        return {}
    read_manifest(output)
    rows = pq.read_table(output, schema=SCHEMA).to_pylist()
    return {row["path"]: row for row in rows if row["error"] is None}


def _inspect(folder: Path, file: str) -> Row:
    """Reads and decodes one file."""
    path = folder / file
    row = dict.fromkeys(SCHEMA.names) | {"path": file, "size": file_size(path)}
    try:
        with path.open("rb") as content:
            row["hash"] = hashlib.file_digest(content, "blake2b").hexdigest()
        row["width"], row["height"] = check_image(path)
    except OSError as error:
        if error.errno in NOT_NOW:
            raise UnreadableNow(f"{path}: cannot be read now ({error.strerror}); run it again") from None
        row["error"] = error.strerror
    except UnreadableNow:
        raise
    except ValueError as error:
        row["error"] = str(error).removeprefix(f"{path}: ")
    return row


@contextmanager
def _mapping(processes: int) -> Iterator[Callable]:
    """Yields `map`, or its counterpart over several processes, which end with this one however it ends."""
    if processes == 1:
        yield map
        return
    # The processes are spawned, since forking a process that has threads may hang.
    pool = worker_processes(processes, "spawn")
    try:
        yield partial(pool.map, chunksize=4)
    finally:
        pool.shutdown(cancel_futures=True)
