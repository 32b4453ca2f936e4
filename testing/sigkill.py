"""SIGKILL at random moments, and on from there."""

import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_kills_change_nothing(target: Callable[[Path], None], folder: Path, kills: int) -> dict[str, bytes]:
    """Runs `target(folder / ...)` in processes, killed at `kills` random moments in all and started again; a new
    folder whenever it got through. Every folder must hold what one undisturbed run leaves, which is returned."""
    context = multiprocessing.get_context("forkserver")  # does the imports once: a start costs milliseconds
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
            seconds *= 0.8  # most should be killed in the middle, also where the machine's speed changes
        else:
            kills -= 1
            seconds *= 1.1
    run(f"killed{rounds}")
    assert all(contents(folder / f"killed{i}") == whole for i in range(rounds + 1))
    return whole
