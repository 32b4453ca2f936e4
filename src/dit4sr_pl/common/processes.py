"""Processes that end with the one that started them, however it ends. This file is also run by itself, see `main`."""

import ctypes
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
# The system's own; joblib sets another, in which PyTorch's workers cannot start.
START_METHOD = multiprocessing.get_all_start_methods()[0]


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
    prctl(PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:  # it has ended meanwhile
        os.kill(os.getpid(), signum)


def prctl(option: int, value: int) -> None:
    """Calls Linux's `prctl`; on other systems it does nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value)


@contextmanager
def signals_exit(*signals: signal.Signals) -> Iterator[None]:
    """Makes each of these signals end this process by SystemExit with code 128 + its number, so that `finally` blocks
    run. A signal that is ignored, as `nohup` does with SIGHUP, stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.getsignal(each) for each in signals}
    for each, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(each, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def run_to_end(command: Sequence[str], folder: Path, log: IO) -> int:
    """Runs a command and returns its exit code; it and all that it started end when this process does.

    Between the two stands a process of this file's `main`, which sees the end of this one, also by SIGKILL, as the end
    of a pipe.

    Args:
        command: the command line.
        folder: the folder in which it runs.
        log: file of its output.
    """
    alive, ends = os.pipe()
    with signals_exit(signal.SIGTERM):
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(alive), *command],
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is this process's to answer
            pass_fds=[alive],
        )
        try:
            return process.wait()
        finally:
            os.close(ends)
            os.close(alive)
            process.wait()


def main(alive: int, command: Sequence[str]) -> int:
    """Runs a command until it or the starting process ends, then kills all that it started.

    Args:
        alive: descriptor of a pipe whose other end the starting process has.
        command: the command line.

    Returns:
        The exit code; that of shells if a signal ended the command.
    """
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # processes whose parents end become this one's, also those of other sessions
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    code = 127
    try:
        process = subprocess.Popen(command, preexec_fn=lambda: end_with_parent(signal.SIGKILL))
        ended = os.pidfd_open(process.pid)
        select.select([alive, ended], [], [])
        code = process.poll()
    except OSError as error:
        print(f"{command[0]}: cannot be started ({error.strerror})", flush=True)
    finally:
        kill_descendants()
    return 128 + signal.SIGKILL if code is None else code if code >= 0 else 128 - code


def kill_descendants() -> None:
    """Kills all processes below this one, until there are none."""
    while True:
        for pid in children(os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)  # what the process had started is a child of this one now
        except ChildProcessError:
            return


def children(parent: int) -> list[int]:
    """Returns the process ids of a process's children, from `/proc`."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(status.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(status.parent.name))
    return found


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
