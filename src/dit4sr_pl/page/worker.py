"""The device's one place: pictures are restored one after another, and work that nobody waits for ends."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn


class Stopped(Exception):
    """The visitor has stopped the work or left, or the server ends."""


class Worker:
    """Runs one piece of work at a time and ends it before the next call of a network.

    A picture takes a call for each tile of its encoding, for each batch of tiles of a step, and for each tile of its
    decoding, so a stop takes effect within one sampling step.

    Args:
        networks: the modules whose calls are watched.
    """

    def __init__(self, networks: Iterable[nn.Module]):
        self.lock, self.check, self.ending = threading.Lock(), None, False
        for network in networks:
            network.register_forward_pre_hook(lambda *_: self.check() if self.check else None)

    @contextmanager
    def working(self, wanted: Callable[[], bool], seconds: float) -> Iterator[Callable[[], None]]:
        """Holds the device during the block, which gets a function that ends it if it is to end.

        Args:
            wanted: whether somebody still waits for the result.
            seconds: the longest time on the device.

        Raises:
            Stopped: nobody waits any more; also out of every call of a network in the block.
            ValueError: the time is over; likewise.
        """
        while not self.lock.acquire(timeout=0.05):
            if self.ending or not wanted():
                raise Stopped
        end = time.monotonic() + seconds

        def check() -> None:
            if self.ending or not wanted():
                raise Stopped
            if time.monotonic() > end:
                raise ValueError(f"not done after {seconds:g} seconds, the page's max_seconds; ask for less")

        try:
            check()
            self.check = check
            yield check
        finally:
            self.check = None
            self.lock.release()

    def end(self) -> None:
        """Ends the work of all, for good."""
        self.ending = True
