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


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Holds a lock file, and with it what it stands for; the kernel lets go of it when this process ends, however that
    is, so that a file that is left over means nothing.

    Raises:
        ValueError: another process holds it.
    """
    with path.open("a+") as file:
        try:
            # Not flock: that one lives on in DataLoader workers, which outlast a killed process by seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(f"{path.parent}: {holder} writes here; wait for it or give another output") from None
        except OSError as error:  # no locks on this file system
            log.warning("%s: cannot be locked (%s); nothing keeps a second run out", path, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} (since {time.strftime('%F %T')})\n")
        file.flush()
        yield
