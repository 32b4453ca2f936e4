"""The web server of the page: it says when it is ready, and ends upon SIGINT, SIGTERM and SIGHUP."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

CONNECTIONS = 500  # open at the same time; further ones are answered with 503
LAST_SECONDS = 2  # for answers that are being sent when the server ends


class Server(uvicorn.Server):
    """A server on one socket.

    Args:
        app: the page.
        ready: called when the page can be opened.
        ends: called when the server is about to end.
    """

    def __init__(self, app: ASGIApp, ready: Callable[[], None], ends: Callable[[], None]):
        options = {"timeout_graceful_shutdown": LAST_SECONDS, "limit_concurrency": CONNECTIONS}
        super().__init__(
            uvicorn.Config(app, log_config=None, log_level="critical", ws="none", server_header=False, **options)
        )
        self.ready, self.ends = ready, ends

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to answer."""
        await super().startup(sockets)
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends what is being done, and stops."""
        self.ends()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ends upon SIGHUP as upon SIGINT and SIGTERM, unless it is ignored, as `nohup` makes it."""
        with super().capture_signals():
            is_main = threading.current_thread() is threading.main_thread()
            before = signal.getsignal(signal.SIGHUP)
            if not is_main or before == signal.SIG_IGN:
                yield
                return
            signal.signal(signal.SIGHUP, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(signal.SIGHUP, before)
