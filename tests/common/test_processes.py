"""Worker processes: they end with the process that started them, by whichever method they were started."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

from dit4sr_pl.common.processes import START_METHOD, worker_processes


def work(sender) -> None:
    """Starts a worker, sends its number, and waits to be killed."""
    workers = worker_processes(1, START_METHOD)
    sender.send(workers.submit(interrupted).result())
    time.sleep(60)


def interrupted() -> int:
    """Returns the number of this process, after Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)
    return os.getpid()


def test_a_worker_ignores_ctrl_c_and_ends_with_a_killed_parent():
    receiver, sender = multiprocessing.Pipe(duplex=False)
    parent = multiprocessing.get_context(START_METHOD).Process(target=work, args=(sender,))
    parent.start()
    worker = Path(f"/proc/{receiver.recv()}/stat")
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 20
    while worker.exists() and worker.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the worker outlives its parent"
        time.sleep(0.01)
