"""Commands as users call them."""

import contextlib
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Runs `python -m ARGUMENTS` in a folder, in a process of its own, and returns its exit code and output."""
    environment = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100)


def call(module: str, *arguments: str | Path, cwd: Path) -> str | None:
    """Runs `python -m MODULE ARGUMENTS` in a folder in this process, which saves the imports of a new one.

    Returns:
        The line that the command ends with on stderr; None: it succeeded.
    """
    main = importlib.import_module(module).main
    with contextlib.chdir(cwd), mock.patch.object(sys, "argv", [module, *map(str, arguments)]):
        try:
            main()
        except SystemExit as end:
            return end.code or None
    return None


def wait_until(holds: Callable[[], bool], seconds: float = 20) -> None:
    """Waits until a condition holds; raises TimeoutError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing after {seconds} s")
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Returns whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
