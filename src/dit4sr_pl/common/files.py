"""Files that appear under their names only when they are complete, and locks that end with their process."""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"  # weights in this package, and published configs of other models

log = logging.getLogger(__name__)


@contextmanager
def atomic_write(path: Path, writer: str = "") -> Iterator[Path]:
    """Yields a hidden name next to `path` to write to; the file becomes `path` when the block ends without an error.

    Args:
        path: the file to write; missing folders are made.
        writer: suffix of the hidden name, which must differ between processes that may write one file. A file that a
            killed process left is overwritten by the next process with the same suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{writer}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path`.

    The kernel releases it when the process ends, even after SIGKILL, so a leftover file does no harm.

    Raises:
        ValueError: another process holds the lock; the message names it.
    """
    with path.open("a+") as file:
        try:
            # Not flock: DataLoader workers would keep it, and they outlast a killed process by seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(f"{path.parent}: {holder} writes here; wait for it or give another output") from None
        except OSError as error:  # this file system has no locks
            log.warning("%s: cannot be locked (%s); a second run would not be refused", path, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} (since {time.strftime('%F %T')})\n")
        file.flush()
        yield
