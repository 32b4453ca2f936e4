"""Processes that end with the one that started them, however it ends."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

PR_SET_PDEATHSIG = 1  # linux/prctl.h
START_METHOD = multiprocessing.get_all_start_methods()[
    0
]  # the system's own; joblib sets another, in which PyTorch's workers cannot start


def worker_processes(count: int, start_method: str) -> ProcessPoolExecutor:
    """Returns a pool of processes that leave Ctrl-C to this process and end with it, however it ends."""
    return ProcessPoolExecutor(count, multiprocessing.get_context(start_method), _follow_parent)


def _follow_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C, in one line

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def end_with_parent(signum: int) -> None:
    """Makes the kernel send a signal to this process when its parent ends; on other systems than Linux it does not."""
    parent = os.getppid()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:  # it has ended meanwhile
        os.kill(os.getpid(), signum)


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """Makes SIGTERM end this process by SystemExit with code 143, so that `finally` blocks run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_to_end(command: Sequence[str], folder: Path, log: IO) -> int:
    """Runs a command and returns its exit code; it and all that it started end when this process does.

    Args:
        command: the command line.
        folder: the folder in which it runs.
        log: file of its output.
    """
    with sigterm_exits():
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: end_with_parent(signal.SIGKILL),
        )
        try:
            return process.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
