"""Restores a folder of odd files by the command, with bicubic in the place of the network, and checks the results."""

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
from PIL import Image
from pytest import MonkeyPatch

from testing.odd_files import Odd, odd_files
from testing.stand_ins import Bicubic, command

LIMIT = 10  # seconds that reading, restoring or writing one file may take


class Hang(BaseException):
    """The error of a file that takes too long. It is no Exception, so that no code on the way catches it."""


@dataclass
class Report:
    """The results of a run.

    Args:
        refused: number of files that the command named as not restored, by kind.
        restored: number of files with a result, by kind.
        skipped: number of the others (folders), by kind.
        slowest: the longest restoring or writing of a file, in seconds.
        wrong: a line for every mistake of the command.
    """

    refused: Counter = field(default_factory=Counter)
    restored: Counter = field(default_factory=Counter)
    skipped: Counter = field(default_factory=Counter)
    slowest: float = 0.0
    wrong: list[str] = field(default_factory=list)


def fuzz(work: Path, count: int, monkeypatch: MonkeyPatch) -> Report:
    """Restores `count` odd files in the folder `work` at scale 1 and reports the results."""
    files, report = write(work / "in", odd_files(count)), Report()
    for part in ("reading.read_picture", "pictures.PictureRestorer.__call__", "pictures.write_picture"):
        watch(f"dit4sr_pl.restoration.{part}", report, monkeypatch)
    watch("dit4sr_pl.restoration.worklist.read_header", report, monkeypatch)
    errors = StringIO()
    with redirect_stderr(errors), redirect_stdout(StringIO()):
        message = command(monkeypatch, Bicubic(), f"input={work / 'in'}", f"output={work / 'out'}", "scale=1")
    named = {line.split(": ")[1] for line in errors.getvalue().splitlines() if line.startswith("not restored: ")}
    if message is None or not message.startswith("error: ") or "\n" in message:
        report.wrong.append(f"ended with {message!r}")
    for path, odd in files.items():
        judge(odd, path, str(path) in named, work / "out" / f"{path.stem}.png", report)
    expected = {f"{path.stem}.png" for path in files}
    report.wrong += [f"left {path}" for path in (work / "out").rglob("*") if path.name not in expected]
    return report


def write(folder: Path, files: list[Odd]) -> dict[Path, Odd]:
    """Writes the files into a new folder and returns them by path."""
    folder.mkdir()
    paths = {folder / f"{i:03}{odd.suffix}": odd for i, odd in enumerate(files)}
    for path, odd in paths.items():
        if isinstance(odd.content, bytes):
            path.write_bytes(odd.content)
        else:
            odd.content(path)
    return paths


def watch(name: str, report: Report, monkeypatch: MonkeyPatch) -> None:
    """Times the calls of a function and raises Hang in those that take longer than LIMIT."""
    from pydoc import locate

    part: Callable = locate(name)

    def timed(*arguments):
        def stop(*_):
            raise Hang(arguments)

        if in_main := threading.current_thread() is threading.main_thread():  # others get no signals
            signal.signal(signal.SIGALRM, stop)
            signal.alarm(LIMIT)
        start = time.perf_counter()
        try:
            return part(*arguments)
        finally:
            if in_main:
                signal.alarm(0)
            report.slowest = max(report.slowest, time.perf_counter() - start)

    monkeypatch.setattr(name, timed)


def judge(odd: Odd, path: Path, named: bool, result: Path, report: Report) -> None:
    """Adds a file to the report; `named` says whether the command named it as not restored."""
    there = result.exists()
    counter = report.refused if named else report.restored if there else report.skipped
    counter[odd.kind] += 1
    if named and there:
        report.wrong.append(f"{path.name}, {odd.kind}: named, but there is a result")
    elif not named and not there and path.is_file():
        report.wrong.append(f"{path.name}, {odd.kind}: neither named nor restored")
    elif odd.refused not in (None, named):
        report.wrong.append(f"{path.name}, {odd.kind}: {'refused' if named else 'restored'}")
    elif there and odd.original is not None and not same_picture(odd.original, result):
        report.wrong.append(f"{path.name}, {odd.kind}: the result shows another picture")


def same_picture(original: bytes, result: Path) -> bool:
    """Returns whether two image files have the same pixels."""
    with Image.open(BytesIO(original)) as expected, Image.open(result) as image:
        return np.array_equal(np.asarray(expected.convert(image.mode)), np.asarray(image))
