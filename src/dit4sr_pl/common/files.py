"""Files that appear under their names only when they are complete, and locks that end with their process."""

import errno
import fcntl
import logging
import os
import secrets
import shutil
import socket
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"  # weights in this package, and published configs of other models

LOCK = ".lock"
FLOCK = "hhqqi4x"  # C's `struct flock`: type, whence, start, length, process
ADVICE = "writes here; wait for it or give another output"
PARTIAL = ".partial"  # suffix of the hidden folders in which files are written
# What a file system answers that cannot lock, or cannot write a folder to the disk.
UNSUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF)

log = logging.getLogger(__name__)
held: set[int] = set()  # descriptors of this process's locks
os.register_at_fork(after_in_child=lambda: close_inherited_locks())


def is_shipped(name: str | Path) -> bool:
    """Returns whether a pipeline in this package has this name, which is no path."""
    return "/" not in str(name) and (ASSETS / name / "model_index.json").is_file()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a path to write to; the file there becomes `path`, complete and on the disk, when the block ends.

    The path lies in a hidden folder with a random name, which this process makes for itself. So two processes never
    write into one file, a link that somebody placed is not followed, and any file name is short enough. The file gets
    the access rights that the umask gives, also from a library that writes its files for the owner alone. A symbolic
    link may be written, too.

    Args:
        path: the file to write; missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / f".{secrets.token_hex(8)}{PARTIAL}"
    folder.mkdir(mode=0o700)
    partial = folder / path.name
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        with suppress(OSError):  # tells `remove_leftovers` that this process is alive
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        created = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY, 0o666)
        mode = stat.S_IMODE(os.fstat(created).st_mode)
        os.close(created)
        yield partial
        if partial.is_symlink():
            os.replace(partial, path)
        else:
            partial.chmod(mode)
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # writing names no file where the disk is full
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def has_contents(path: Path) -> bool:
    """Returns whether a file exists and is not empty, as a power cut may leave files of other programs."""
    return path.is_file() and path.stat().st_size > 0


def sync(path: Path) -> None:
    """Waits until the contents of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes were writing in a folder and below it; files of living processes stay."""
    for partial in folder.rglob(f".*{PARTIAL}"):
        with suppress(OSError):  # somebody else's, or gone
            descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(partial)
            finally:
                os.close(descriptor)


@contextmanager
def folder_lock(folder: Path, shard: tuple[int, int] = (1, 1)) -> Iterator[None]:
    """Holds an output folder against other processes, and removes what killed ones were writing there.

    Args:
        folder: the folder.
        shard: (i, n): the other shards of n may write there at the same time.

    Raises:
        ValueError: another process writes there; the message names it.
    """
    number, count = shard
    shared = count > 1
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(exclusive_lock(folder / LOCK, shared))
        # Also the folder itself, which nobody can remove as they can `.lock`.
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        held.add(descriptor)
        stack.callback(release, descriptor)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise ValueError(f"{folder}: another process {ADVICE}") from None
        if shared:
            stack.enter_context(exclusive_lock(folder / f"{LOCK}-{number}-of-{count}"))  # `is_held` knows this name
        remove_leftovers(folder)
        yield


@contextmanager
def exclusive_lock(path: Path, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Holds a lock on `path`, a file that is made for this and removed in the end.

    The kernel releases the lock when the process ends, even after SIGKILL, so a leftover file does no harm. Forked
    processes do not keep it: DataLoader workers outlast a killed process by seconds.

    Args:
        path: the lock file.
        shared: whether others may hold the lock as `shared` at the same time.
        wait: whether to wait for other holders.

    Raises:
        ValueError: another process holds the lock; the message names it.
    """
    owner, descriptor = os.getpid(), acquire(path, shared, wait)
    try:
        if not shared:
            since = time.strftime("%F %T")
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {owner} on {socket.gethostname()} (since {since})\n".encode())
        yield
    finally:
        if os.getpid() == owner:
            with suppress(OSError, ValueError):  # others share the lock, or the file is gone
                lock(descriptor, path)
                if is_file_of(descriptor, path):
                    path.unlink()
            release(descriptor)


def is_held(path: Path) -> bool:
    """Returns whether another process holds the lock on `path`."""
    try:
        with exclusive_lock(path):
            return False
    except ValueError:
        return True


def acquire(path: Path, shared: bool, wait: bool) -> int:
    """Returns the descriptor of a locked file; arguments and errors are those of `exclusive_lock`."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        held.add(descriptor)
        try:
            lock(descriptor, path, shared, wait)
            if is_file_of(descriptor, path):
                return descriptor
        except BaseException:
            release(descriptor)
            raise
        release(descriptor)  # the former holder has removed the file meanwhile


def is_file_of(descriptor: int, path: Path) -> bool:
    """Returns whether `path` still names this open file; another process may have removed or replaced it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def lock(descriptor: int, path: Path, shared: bool = False, wait: bool = False) -> None:
    """Locks an open file. The lock belongs to this descriptor, not to the process as POSIX locks do, which end when
    any part of the process closes the file; errors are those of `exclusive_lock`."""
    whole_file = struct.pack(FLOCK, fcntl.F_RDLCK if shared else fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, whole_file)
    except (BlockingIOError, PermissionError):
        holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
        raise ValueError(f"{path.parent}: {holder} {ADVICE}") from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        log.warning("%s: cannot be locked (%s); a second run would not be refused", path, error.strerror)


def release(descriptor: int) -> None:
    """Unlocks and closes a lock's descriptor; a process that was forked a moment ago may still have it, too."""
    held.discard(descriptor)
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    with suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(FLOCK, fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))
    os.close(descriptor)


def close_inherited_locks() -> None:
    """Closes the parent's locks in a forked process, so that they end with the parent."""
    while held:
        with suppress(OSError):
            os.close(held.pop())
