"""Reading ahead, and batches of what was read."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Item, Content = TypeVar("Item"), TypeVar("Content")


def read_ahead(read: Callable[[Item], Content], items: Iterable[Item], count: int) -> Iterator[Content]:
    """Yields `read(item)` for every item; a thread reads `count` items ahead, so that no more wait in memory.

    Args:
        read: what the thread does; its error is raised when the content would be yielded.
        items: what to read.
        count: number of items that are read, or begun, before they are asked for.
    """
    begun = deque()
    with ThreadPoolExecutor(1, "reader") as reader:
        try:
            for item in items:
                begun.append(reader.submit(read, item))
                if len(begun) > count:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            reader.shutdown(cancel_futures=True)


def in_batches(items: Iterable[Item], most: int, key: Callable[[Item], Any]) -> Iterator[list[Item]]:
    """Yields up to `most` items at a time, which follow one another and have the same `key`."""
    for _, same in itertools.groupby(items, key):
        while batch := list(itertools.islice(same, most)):
            yield batch
