"""The page for tests and benchmarks: a server in this process, and a client that speaks to it as a browser does."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from starlette.types import ASGIApp
from torch import Tensor

from dit4sr_pl.app import networks
from dit4sr_pl.page.blocks import Page
from dit4sr_pl.page.fields import Limits
from dit4sr_pl.page.folder import PageFolder
from dit4sr_pl.page.hosts import Hosts, listen, url
from dit4sr_pl.page.server import Server
from dit4sr_pl.page.visitors import Visitors
from dit4sr_pl.page.worker import Worker
from dit4sr_pl.restoration.restorer import Restorer

API = "/gradio_api"
LIMITS = Limits(10**6, 4096, 100, 30, 2000, 20000, 60)


def make_page(restorer: Restorer, path: Path, captioner: Callable[[list[Tensor]], list[str]] | None = None) -> Page:
    """Returns a page with its files in a folder."""
    folder, worker = PageFolder(path, 10**8), Worker(networks(restorer, None))
    return Page(restorer, worker, LIMITS, (1, 8), folder, Visitors(folder.leave), captioner)


@contextmanager
def serving(page: Page, host: str = "127.0.0.1", queue: int = 5) -> Iterator[str]:
    """Serves a page in a thread; yields its address. GRADIO_TEMP_DIR must be the page's folder."""
    ready = threading.Event()
    with listen(host, 0) as place:

        async def build() -> ASGIApp:  # outside of an event loop, Gradio makes some that it does not close
            return page.application(page.blocks(4, "", 0), Hosts.of(host, ["page.example"]), 10**6, queue)

        application = asyncio.run(build())
        server = Server(application, ready.set, page.worker.end)
        thread = threading.Thread(target=server.run, args=([place],))
        thread.start()
        try:
            assert ready.wait(30)
            yield url(host, place.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(30)
        assert not thread.is_alive()


def has_ipv6() -> bool:
    """Returns whether this machine has IPv6 addresses."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        return True
    except OSError:
        return False


@dataclass
class Visitor:
    """A client of the page.

    Args:
        address: the page's.
        session: name of its session.
    """

    address: str
    session: str = "visitor"
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.address, timeout=60, trust_env=False)

    def upload(self, name: str, content: bytes) -> dict:
        """Uploads a file; returns it as the page sends it."""
        answer = self.http.post(f"{API}/upload", files={"files": (name, content)})
        answer.raise_for_status()
        return {"path": answer.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def join(self, file: dict, **values: object) -> str:
        """Asks for a picture; returns the event. `values` are settings other than the smallest work."""
        answer = self.post(file, **values)
        assert answer.status_code == 200, answer.text
        return answer.json()["event_id"]

    def post(self, file: object, **values: object) -> httpx.Response:
        """Sends a request for a picture; returns the answer to it, which does not wait for the picture."""
        data = {
            "scale": 1,
            "caption": "",
            "steps": 1,
            "guidance": 1.0,
            "color": "none",
            "seed": 0,
            "added": "",
            "no": "",
        }
        body = {"data": [file, *(data | values).values()], "session_hash": self.session}
        return self.http.post(f"{API}/call/restore_file", content=json.dumps(body))

    def wait(self, event: str, seconds: float | None = None) -> tuple[str, object]:
        """Waits for the outcome of an event, `complete` or `error`, and its data; `left` after so many seconds."""
        waiting = {} if seconds is None else {"timeout": seconds}
        try:
            with self.http.stream("GET", f"{API}/call/restore_file/{event}", **waiting) as stream:
                kind = None
                for line in stream.iter_lines():
                    if line.startswith("event: "):
                        kind = line.removeprefix("event: ")
                    elif line.startswith("data: ") and kind in ("complete", "error"):
                        return kind, json.loads(line.removeprefix("data: "))
        except httpx.ReadTimeout:
            if seconds is None:
                raise
            return "left", None
        return "error", None

    def restore(self, file: dict, **values: object) -> tuple[str, object]:
        """Asks for a picture and waits for it."""
        return self.wait(self.join(file, **values))

    def download(self, shown: dict) -> bytes:
        """Returns the contents of a file that the page shows."""
        return self.http.get(shown["url"]).raise_for_status().content
