"""Requests are checked before Gradio gets them: names, routes, sizes, JSON.

Gradio answers requests that no page of its own sends with tracebacks, and offers routes that this page has no use for.
Here only what the page needs passes, in the form in which the page sends it.
"""

import asyncio
import json
import logging
import os
import re
from collections.abc import Callable
from urllib.parse import parse_qs, unquote

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dit4sr_pl.page.fields import is_within
from dit4sr_pl.page.folder import PageFolder
from dit4sr_pl.page.hosts import Hosts
from dit4sr_pl.page.visitors import Visitors

API = "/gradio_api"
JSON_BYTES = 2**18  # of a request other than an upload; the longest three texts take 72 kB in JSON
MULTIPART_BYTES = 2**14  # of an upload next to its file
PATIENCE = 30  # seconds in which the next piece of a request has to come in
WORD = re.compile(r"[\w-]{1,64}", re.ASCII)  # of sessions and events
READ = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|pwa_icon(/\d+)?|(static|assets|svelte)/.*)|"
    rf"{API}/(info|app_id|startup-events|theme\.css|queue/(status|data)|heartbeat/[^/]+|call/[^/]+/[^/]+|"
    r"upload_progress|file=.*)"
)
FORMS = {"join": ("data", "fn_index", "session_hash", "trigger_id"), "call": ("data", "session_hash")}
FORMS |= {"cancel": ("session_hash", "fn_index", "event_id"), "reset": ("event_id",)}

log = logging.getLogger(__name__)


class Refused(Exception):
    """A request that is answered with a status and one line, and does not reach Gradio."""

    def __init__(self, status: int, detail: str):
        self.status, self.detail = status, detail


class RequestFilter:
    """The outermost layer of the server, around Gradio's.

    Args:
        app: Gradio's ASGI app.
        hosts: the names under which the page answers.
        folder: the page's files.
        visitors: who is there.
        checks: by the index and by the name of each of Gradio's functions, what checks the values of a request.
        max_file_size: bytes of an upload.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Hosts,
        folder: PageFolder,
        visitors: Visitors,
        checks: dict[int | str, Callable[[object], list]],
        max_file_size: int,
    ):
        self.app, self.hosts, self.folder, self.visitors = app, hosts, folder, visitors
        self.checks, self.max_file_size = checks, max_file_size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or hands it on."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        try:
            self.check_names(Headers(scope=scope))
            await self.route(scope, patient(receive), send)
        except Refused as refused:
            await JSONResponse({"detail": refused.detail}, refused.status)(scope, receive, send)
        except (ClientDisconnect, asyncio.CancelledError):  # nobody is there to be answered
            return
        except Exception:
            log.exception("%s %.200r", scope["method"], scope["path"])

    def check_names(self, headers: Headers) -> None:
        """Raises Refused unless the request was sent to a name of the page, by a program or by the page itself."""
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        forwarded = [host.strip() for line in headers.getlist("x-forwarded-host") for host in line.split(",")]
        # Gradio makes addresses of the forwarded name.
        if len(hosts) != 1 or not all(map(self.hosts.allows, hosts + forwarded)):
            raise Refused(400, "this page does not answer under this name; its command takes hosts=[NAME]")
        if any(not self.hosts.allows_origin(origin, hosts[0]) for origin in origins):
            raise Refused(403, "the request comes from another site; the page's command takes hosts=[NAME]")

    async def route(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands a request on that is one of the page's."""
        method, path = scope["method"], scope["path"].rstrip("/") or "/"
        if method in ("GET", "HEAD") and READ.fullmatch(path):
            return await self.read(path, scope, receive, send)
        posted = re.fullmatch(rf"{API}/(upload|queue/join|call/([^/]+)|cancel|reset)", path)
        if posted is None or method != "POST":
            known = posted is not None or READ.fullmatch(path)
            raise Refused(405, "not a method of this address") if known else Refused(404, "no such address")
        if posted[1] == "upload":
            return await self.upload(scope, receive, send)
        body = await whole_body(Headers(scope=scope), receive)
        kind = {"queue/join": "join"}.get(posted[1], posted[1].partition("/")[0])
        passed = json.dumps(self.form(kind, parsed(body), posted[2])).encode()
        await self.app(with_length(scope, len(passed)), replayed(passed, receive), send)

    async def read(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands on a request that reads; a connection that waits for results counts as long as it is open."""
        session, page = None, False
        if path.startswith(f"{API}/file="):
            file = scope["path"].partition("=")[2]
            if "\0" in file or not os.path.isabs(file) or not is_within(file, self.folder.path):
                raise Refused(404, "no such file")
        elif path == f"{API}/queue/data":
            session = parse_qs(scope["query_string"].decode(errors="replace")).get("session_hash", [""])[0]
        elif path == f"{API}/upload_progress":
            self.word(parse_qs(scope["query_string"].decode(errors="replace")).get("upload_id", [""])[0], "upload_id")
        elif path.startswith((f"{API}/heartbeat/", f"{API}/call/")):
            session, page = unquote(path.rpartition("/")[2]), path.startswith(f"{API}/heartbeat/")
        if session is None:
            return await self.app(scope, receive, send)
        with self.visitors.connected(self.word(session, "session"), page):
            await self.app(scope, receive, send)

    async def upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands on an upload that says how large it is, if there is room for it."""
        headers = Headers(scope=scope)
        length, kind = headers.get("content-length", ""), headers.get("content-type", "")
        if not re.fullmatch(r"multipart/form-data;.*boundary=.+", kind, re.IGNORECASE):
            raise Refused(415, "uploads are multipart/form-data")
        if not re.fullmatch(r"\d{1,15}", length):
            raise Refused(411, "an upload has to say its length")
        if int(length) > self.max_file_size + MULTIPART_BYTES:
            raise Refused(413, f"larger than {self.max_file_size} bytes, the page's max_file_size")
        try:
            await asyncio.to_thread(self.folder.make_room, int(length), self.visitors.is_there)
        except ValueError as error:
            raise Refused(507, str(error)) from None
        await self.app(scope, receive, send)

    def form(self, kind: str, body: object, name: str | None) -> dict:
        """Returns the body of a request with what Gradio needs of it, checked.

        Args:
            kind: one of `FORMS`.
            body: the JSON that came.
            name: the function's name in the path, if it is there.

        Raises:
            Refused: a value is missing or wrong.
        """
        if not isinstance(body, dict):
            raise Refused(400, "the body is no JSON object")
        form = {key: body.get(key) for key in FORMS[kind]}
        for key in ("session_hash", "event_id"):
            if key in form and (form[key] is not None or kind != "call"):
                form[key] = self.word(form[key], key)
        for key in ("fn_index", "trigger_id"):
            if key in form and (form[key] is not None or key == "fn_index"):
                form[key] = index(form[key], key)
        if "data" in form:
            function = form["fn_index"] if kind == "join" else name
            if function not in self.checks:
                raise Refused(404, "no such function")
            try:
                form["data"] = self.checks[function](form["data"])
            except ValueError as error:
                raise Refused(400, str(error)) from None
            if form["session_hash"] is not None:
                for value in form["data"]:
                    if isinstance(value, dict):
                        self.folder.hold(form["session_hash"], value["path"])
        return form

    def word(self, value: object, name: str) -> str:
        """Returns the identifier of a session or an event; raises Refused if it is none."""
        if not isinstance(value, str) or not WORD.fullmatch(value):
            raise Refused(400, f"{name}: must be 1 to 64 letters, digits, _ or -")
        return value


def index(value: object, name: str) -> int:
    """Returns the number of a function or a component; raises Refused if it is none."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise Refused(400, f"{name}: must be a whole number")
    return value


def parsed(body: bytes) -> object:
    """Returns JSON whose numbers are finite and whose texts are UTF-8.

    Raises:
        Refused: it is something else.
    """

    def not_finite(name: str) -> None:
        raise ValueError(f"{name} is no number in JSON")

    try:
        value = json.loads(body, parse_constant=not_finite)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"not valid JSON ({type(error).__name__})") from None


async def whole_body(headers: Headers, receive: Receive) -> bytes:
    """Returns a request's body.

    Raises:
        Refused: it is too long.
        ClientDisconnect: it does not come to its end.
    """
    body, more = bytearray(), True
    if headers.get("content-length", "0").isdigit() and int(headers.get("content-length", "0")) > JSON_BYTES:
        raise Refused(413, f"more than {JSON_BYTES} bytes")
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > JSON_BYTES:
            raise Refused(413, f"more than {JSON_BYTES} bytes")
    return bytes(body)


def patient(receive: Receive) -> Receive:
    """Returns `receive` for a body whose pieces come in within `PATIENCE`; else the client counts as gone."""
    complete = False

    async def next_message() -> Message:
        nonlocal complete
        if complete:  # now it waits for the client to leave
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), PATIENCE)
        except TimeoutError:
            return {"type": "http.disconnect"}
        complete = not message.get("more_body", False)
        return message

    return next_message


def replayed(body: bytes, receive: Receive) -> Receive:
    """Returns a `receive` that gives a body that was read before, then waits for the client to leave."""
    sent = False

    async def next_message() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message


def with_length(scope: Scope, length: int) -> Scope:
    """Returns the scope of a request with a JSON body of this length."""
    replaced = b"content-length", b"content-type", b"transfer-encoding"
    other = [pair for pair in scope["headers"] if pair[0] not in replaced]
    own = [(b"content-length", str(length).encode()), (b"content-type", b"application/json")]
    return {**scope, "headers": other + own}
