"""How far a command is: a bar in a terminal; a line every half minute where the output goes into a file.

The lines come from a thread, so that there are some while one step takes minutes. Each is of the innermost work that
runs, and a command that says nothing else says how long it has been running.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

SECONDS = 30  # between two lines
FIRST = 10  # seconds until the first line of a work, which says how long it takes


def in_terminal() -> bool:
    """Returns whether stderr is a terminal that can show a bar."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


@dataclass(eq=False)
class Sign:
    """A work that runs, whose progress `write` writes when it is `due`, and then every so many seconds."""

    write: Callable[[], None]
    seconds: float
    due: float


running: list[Sign] = []  # from the command to the innermost work
thread: threading.Thread | None = None


@contextmanager
def sign(write: Callable[[], None], seconds: float = SECONDS, first: float = FIRST) -> Iterator[None]:
    """Lets `write` be called after `first` seconds and then every so many seconds, as long as the block runs."""
    shown = Sign(write, seconds, time.monotonic() + min(first, seconds))
    running.append(shown)
    try:
        yield
    finally:
        running.remove(shown)
        if running:
            running[-1].due = time.monotonic() + running[-1].seconds


def tick() -> None:
    """Writes the line of the innermost work, if it is due."""
    if running and time.monotonic() >= (innermost := running[-1]).due:
        innermost.due = time.monotonic() + innermost.seconds
        innermost.write()


@contextmanager
def signs_of_life(command: str) -> Iterator[None]:
    """Writes lines from a thread, as long as the block runs; by itself, without a terminal, `plan: 30 s so far`."""
    global thread
    if thread is not None:
        yield
        return
    ended, began = threading.Event(), time.monotonic()

    def repeat() -> None:
        while not ended.wait(1):
            tick()

    thread = threading.Thread(target=repeat, name="signs of life", daemon=True)
    thread.start()
    try:
        so_far = sign(lambda: print_line(f"{command}: {in_words(time.monotonic() - began)} so far"), first=SECONDS)
        with nullcontext() if in_terminal() else so_far:
            yield
    finally:
        ended.set()
        thread.join()
        thread = None


def track(items: Collection[Any], description: str) -> Iterator[Any]:
    """Yields the items of a collection and shows how many are done."""
    with work(description, len(items)) as show:
        for done, item in enumerate(items, 1):
            yield item
            show(done)


@contextmanager
def work(description: str, total: float | None = None, count: int | None = None) -> Iterator[Callable[..., None]]:
    """Yields a function `show(done, total=None, items=0)` that shows how much of a work is done.

    Args:
        description: what is done.
        total: amount of work, in any unit; None: not known yet.
        count: number of items, if that is not the amount of work; `show` is then given how many are done.
    """
    with (bar if in_terminal() else lines)(description, total, count) as show:
        yield show


@contextmanager
def bar(description: str, total: float | None, count: int | None) -> Iterator[Callable[..., None]]:
    """Shows a bar on stderr; arguments are those of `work`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    items = TextColumn("{task.description} {task.fields[items]}")
    console = Console(stderr=True)
    with Progress(items, BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console) as shown:
        task = shown.add_task(description, total=total, items=counted(0, total, 0, count))

        def show(done: float, total: float | None = total, items: int = 0) -> None:
            shown.update(task, completed=done, total=total, items=counted(done, total, items, count))

        yield show


@contextmanager
def lines(description: str, total: float | None, count: int | None) -> Iterator[Callable[..., None]]:
    """Writes lines on stderr; arguments are those of `work`."""
    began, state = time.monotonic(), {"done": 0, "total": total, "items": 0}

    def show(done: float, total: float | None = total, items: int = 0) -> None:
        state.update(done=done, total=total, items=items)

    def write() -> None:
        done, total, items = state.values()
        elapsed = time.monotonic() - began
        left = f"about {in_words(elapsed / done * (total - done))} left" if done and total else in_words(elapsed)
        print_line(f"{description}: {', '.join(filter(None, [counted(done, total, items, count), left]))}")

    with sign(write):
        yield show


def print_line(text: str) -> None:
    """Prints a line on stderr at once, also if that is a file; a closed pipe does not stop the work."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def counted(done: float, total: float | None, items: int, count: int | None) -> str:
    """Returns the items that are done, such as `12 of 100`; empty where their number is not known."""
    if count is not None:
        return f"{items} of {count}"
    return "" if total is None else f"{done} of {total}"


def in_words(seconds: float) -> str:
    """Returns a time as `40 s`, `12 min` or `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
