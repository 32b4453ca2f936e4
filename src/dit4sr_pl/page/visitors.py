"""Who is there: the connections by which pages and programs wait for their results."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GRACE = 10  # seconds after which a page that has closed its connections does not come back


class Visitors:
    """Counts open connections by session.

    Args:
        left: called with a session that is gone and whether it had a page open.
    """

    def __init__(self, left: Callable[[str, bool], None]):
        self.left, self.pages, self.streams = left, Counter(), Counter()

    def is_there(self, *sessions: str) -> bool:
        """Returns whether one of these sessions has a connection."""
        return any(self.pages[session] or self.streams[session] for session in sessions)

    @contextmanager
    def connected(self, session: str, page: bool) -> Iterator[None]:
        """Counts a connection during the block, in the server's event loop.

        Args:
            session: the session.
            page: whether it is the one that a page keeps while it is open, or one that a result comes through.
        """
        counter = self.pages if page else self.streams
        counter[session] += 1
        try:
            yield
        finally:
            counter[session] -= 1
            if not counter[session]:
                del counter[session]
            if page:
                asyncio.get_running_loop().call_later(GRACE, self._may_be_gone, session, True)
            else:
                self._may_be_gone(session, False)

    def _may_be_gone(self, session: str, page: bool) -> None:
        if not self.is_there(session):
            self.left(session, page)
