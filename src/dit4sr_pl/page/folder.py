"""The page's temporary folder: it is gone with its server, and what it holds has a limit."""

import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "dit4sr_pl-page-"
LEAST = 2**16  # bytes that a file counts for, so that empty ones have a limit, too
ABANDONED = 60  # seconds without a write after which a file is no upload in progress; each piece has to come in 30
KEPT = 600  # seconds that files are kept for somebody who has no page open, if there is no room for others


class PageFolder:
    """A folder of uploads and results; its methods may be called by several threads.

    Args:
        path: the folder.
        most: bytes of all its files together.
    """

    def __init__(self, path: Path, most: int):
        self.path, self.most, self.lock = path, most, threading.RLock()
        self.uploads: dict[str, dict[Path, int]] = {}  # by session: uploads with the time at which they were written
        self.results: dict[str, Path] = {}  # by session: the folder of the result that its page shows

    def used(self) -> int:
        """Returns the bytes of all files, each of at least 64 KiB."""
        return sum(max(LEAST, status.st_size) for _, status in self._files())

    def make_room(self, size: int, is_there: Callable[[str], bool]) -> None:
        """Makes room for `size` more bytes; what nobody has a page open for goes first, if it is ten minutes old.

        Args:
            size: the bytes.
            is_there: whether a session is still connected.

        Raises:
            ValueError: there is no room.
        """
        held = self._held(is_there)
        used, now = self.used(), time.time()
        files = [(file.parent != self.path, status.st_mtime, file, status.st_size) for file, status in self._files()]
        for complete, written, file, length in sorted(files):  # Gradio gives an upload a folder when it is complete
            age = now - written
            unwanted = age > KEPT and file not in held and used + size > self.most
            if unwanted or (not complete and age > ABANDONED):
                remove(file)
                used -= max(LEAST, length)
        if used + size > self.most:
            raise ValueError("the server has no room for more images now; try again in some minutes")

    def hold(self, session: str, file: str | Path) -> None:
        """Notes that an upload belongs to a session, until `leave`."""
        with suppress(FileNotFoundError), self.lock:
            self.uploads.setdefault(session, {})[Path(file)] = Path(file).stat().st_mtime_ns

    def new_result(self, session: str, size: int, is_there: Callable[[str], bool]) -> Path:
        """Returns a new folder for the session's result, in the place of its last one; `size` is the most bytes that it
        takes, and errors are those of `make_room`.
        """
        self.make_room(size, is_there)
        folder = Path(tempfile.mkdtemp(prefix="result-", dir=self.path))
        with self.lock:
            last, self.results[session] = self.results.get(session), folder
        if last is not None:
            remove(last)
        return folder

    def leave(self, session: str, results: bool) -> None:
        """Removes the uploads of a session, and its results if `results`; an upload that somebody else has sent again
        meanwhile stays.
        """
        with self.lock:
            for file, written in self.uploads.pop(session, {}).items():
                with suppress(FileNotFoundError):
                    if file.stat().st_mtime_ns == written and not any(file in files for files in self.uploads.values()):
                        remove(file)
            folder = self.results.pop(session, None)
        if folder is not None and results:
            remove(folder)

    def _held(self, is_there: Callable[[str], bool]) -> set[Path]:
        """Returns the files of sessions that are connected, and forgets the others that have no files any more."""
        held = set()
        with self.lock:
            for session in {*self.uploads, *self.results}:
                files = {*self.uploads.get(session, ())}
                if session in self.results:
                    files |= {*self.results[session].glob("*")}
                if is_there(session):
                    held |= files
                elif not any(file.exists() for file in files):
                    self.uploads.pop(session, None)
                    self.results.pop(session, None)
        return held

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for parent, _, names in os.walk(self.path):
            for name in names:
                with suppress(FileNotFoundError):
                    yield Path(parent, name), Path(parent, name).lstat()


def remove(path: Path) -> None:
    """Removes a file with the folder that Gradio or `new_result` made for it, or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    path.unlink(missing_ok=True)
    if path.parent.name.startswith("result-") or len(path.parent.name) == 64:  # a SHA-256
        with suppress(OSError):  # not empty
            path.parent.rmdir()


@contextmanager
def page_folder(parent: Path, most: int) -> Iterator[PageFolder]:
    """Makes a folder that only this user can read, and removes it in the end. Folders of servers that were killed are
    removed before.

    A lock on the folder, which the kernel releases with its process, tells them apart from those of living servers.

    Args:
        parent: where to make it.
        most: bytes of all files in it.
    """
    parent.mkdir(parents=True, exist_ok=True)
    remove_dead(parent)
    path = Path(os.path.realpath(tempfile.mkdtemp(prefix=PREFIX, dir=parent)))
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks, on which `remove_dead` removes nothing
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield PageFolder(path, most)
    finally:
        for _ in range(10):  # a thread that is stopping may have written a file meanwhile
            shutil.rmtree(path, ignore_errors=True)
            if not path.exists():
                break
            time.sleep(0.1)
        os.close(lock)


def remove_dead(parent: Path) -> None:
    """Removes the folders that killed servers of this user have left."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # somebody else's, in use, or gone
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                status = os.fstat(descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if status.st_uid == os.getuid() and time.time() - status.st_ctime > 2:  # else it may not be locked yet
                    shutil.rmtree(folder)
            finally:
                os.close(descriptor)
