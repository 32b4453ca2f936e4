"""SIGKILL at random moments, and the same call again."""

import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of all files below a folder by their path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_kills_change_nothing(target: Callable[[Path], None], folder: Path, kills: int) -> dict[str, bytes]:
    """Checks that kills leave no trace in what a call writes.

    Runs `target(folder / ...)` in processes that are killed at random moments and started again, in a new folder after
    every call that ended by itself. Every folder must hold the files of one undisturbed run.

    Args:
        target: writes into the folder that it is given.
        folder: folder of all runs.
        kills: number of kills.

    Returns:
        The bytes of all files of the undisturbed run by their path.
    """
    context = multiprocessing.get_context("forkserver")  # imports happen once, so that a start takes milliseconds
    context.set_forkserver_preload(
        ["dit4sr_pl.backbone.sd3", "dit4sr_pl.preparation.captioner", "dit4sr_pl.evaluation.scoring", "pytest"]
    )

    def run(name: str, seconds: float | None = None) -> bool:
        process = context.Process(target=target, args=(folder / name,))
        process.start()
        process.join(seconds)
        if through := not process.is_alive():
            assert process.exitcode == 0
        process.kill()
        process.join()
        return through

    run("first")  # also starts the server
    start = time.monotonic()
    run("whole")
    seconds = time.monotonic() - start
    whole = contents(folder / "whole")

    draws, rounds = random.Random(0), 0
    while kills:
        if run(f"killed{rounds}", draws.uniform(0, seconds)):
            rounds += 1
            seconds *= 0.8  # most runs should be killed midway, even if the speed of the machine changes
        else:
            kills -= 1
            seconds *= 1.1
    run(f"killed{rounds}")
    assert all(contents(folder / f"killed{i}") == whole for i in range(rounds + 1))
    return whole
