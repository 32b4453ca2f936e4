"""Files that appear under their names only when they are complete."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, writer: str = "") -> Iterator[Path]:
    """A hidden name beside `path` to write to; it becomes `path` when the block ends without an error.

    What a killed process left is overwritten by the next one of the same `writer`, which must be given where several
    processes may write one file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{writer}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
