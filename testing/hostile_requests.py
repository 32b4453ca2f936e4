"""Requests that no page sends: wrong, huge, stolen, broken off. Drawn from a seed, each followed by an honest one."""

import contextlib
import json
import random
import socket
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from urllib.parse import urlsplit

import httpx
from PIL import Image

from testing.odd_files import odd_files, png
from testing.pages import API, Visitor

LONG = 20  # seconds after which a request or the honest one behind it counts as hung
FINE = {507, 503}  # statuses above 499 that say what is wrong: no room, a full queue
Request = Callable[["Attack"], None]


@dataclass
class Attack:
    """Hostile requests to a page.

    Args:
        address: the page's.
        seed: seed of the draws.
        probe_every: number of hostile requests behind which an honest one is sent.
    """

    address: str
    seed: int = 0
    probe_every: int = 1
    answered: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.draws, self.visitor = random.Random(self.seed), Visitor(self.address, "hostile")
        self.visitor.http.timeout = LONG
        image = BytesIO()
        Image.effect_noise((24, 20), 50).save(image, "PNG")
        self.photo = image.getvalue()

    def run(self, count: int) -> None:
        """Sends `count` requests, the kinds in turn, and notes how they are answered."""
        for number in range(count):
            kind = KINDS[number % len(KINDS)]
            self.kind = f"{number} {kind.__name__}"
            try:
                kind(self)
            except httpx.TimeoutException:
                self.wrong.append(f"{self.kind}: no answer in {LONG} s")
            except httpx.TransportError:
                self.answered[f"{kind.__name__}: closed"] += 1
            if number % self.probe_every == 0:
                self.probe()

    def probe(self) -> None:
        """Sends an honest request and notes how long it takes."""
        honest, start = Visitor(self.address, f"honest{len(self.waits)}"), time.monotonic()
        honest.http.timeout = 2 * LONG
        try:
            with honest.http:
                outcome, _ = honest.restore(honest.upload("photo.png", self.photo))
            if outcome != "complete":
                self.wrong.append(f"{self.kind}: the honest request behind it ended with {outcome}")
        except (httpx.HTTPError, AssertionError) as error:
            self.wrong.append(f"{self.kind}: the honest request behind it failed: {error!r}")
        self.waits.append(time.monotonic() - start)

    @property
    def longest_hold(self) -> float:
        """Seconds that an honest request waited longer than the fastest one."""
        return max(self.waits) - min(self.waits)

    def send(self, method: str, path: str, **options) -> httpx.Response:
        """Sends a request; an answer that blames the server, or shows its code, is wrong."""
        answer = self.visitor.http.request(method, path, **options)
        self.judge(answer.status_code, answer.text)
        return answer

    def judge(self, status: int, text: str) -> None:
        """Notes an answer."""
        self.answered[f"{self.kind.split()[1]}: {status}"] += 1
        if (status > 499 and status not in FINE) or "Traceback" in text:
            self.wrong.append(f"{self.kind}: {status} {text[:200]}")

    def file(self) -> dict:
        """Returns an uploaded photo."""
        return self.visitor.upload("photo.png", self.photo)

    def raw(self, content: bytes) -> None:
        """Sends bytes as they are, reads what comes, and closes the connection."""
        place = urlsplit(self.address)
        with socket.create_connection((place.hostname, place.port), timeout=LONG) as connection:
            connection.sendall(content)
            connection.settimeout(0.5)
            answer = b""
            with contextlib.suppress(TimeoutError, ConnectionError):
                answer = connection.recv(65536)
        status = answer.split(b" ")[1:2]
        self.judge(int(status[0]) if status and status[0].isdigit() else 0, answer.decode(errors="replace"))


def junk(draws: random.Random) -> object:
    """Returns a value that no field takes."""
    nested = {}
    for _ in range(draws.randint(1, 200)):
        nested = {"path": nested, "meta": {"_type": "gradio.FileData"}}
    values = [None, True, [], {}, nested, float("nan"), float("inf"), -1, 0, 2**70, -(2**70), 1e308, 0.5, "abc", "7"]
    return draws.choice([*values, "x" * draws.randint(10**4, 3 * 10**6), "\ud800", "\0", "<script>", [[[[]]]]])


def wrong_value(attack: Attack) -> None:
    """One field of the function has junk in it."""
    data = [attack.file(), 1, "", 1, 1.0, "none", 0, "", ""]
    place = attack.draws.randrange(len(data))
    # An empty caption, a whole number within bounds are no junk there: these requests are carried out, for nobody.
    data[place] = junk(attack.draws)
    session = f"s{attack.draws.getrandbits(32)}"
    body = json.dumps({"data": data, "fn_index": 0, "trigger_id": 1, "session_hash": session})
    attack.send("POST", f"{API}/queue/join", content=body)


def wrong_body(attack: Attack) -> None:
    """The body is no request at all, or has fields missing, wrong or too many."""
    draws, data = attack.draws, [attack.file(), 1, "", 1, 1.0, "none", 0, "", ""]
    other = {key: junk(draws) for key in ("event_data", "batched", "simple_format", "oauth_token", "event_id", "extra")}
    whole = {"data": data, "fn_index": 0, "session_hash": "hostile", "trigger_id": 1}
    bodies = [b"", b"null", b"[]", b"{", b"\xff\xfe", b"[" * 100000, b'{"data": NaN}', b"1" * 5000]
    bodies += [json.dumps(whole | {key: junk(draws)}).encode() for key in whole]
    bodies += [json.dumps({key: whole[key] for key in whole if key != left}).encode() for left in whole]
    bodies += [json.dumps(whole | {"data": data[:size]}).encode() for size in (0, 1, 8)]
    bodies += [json.dumps(whole | {"data": data * 1000}).encode(), json.dumps(whole | other).encode()]
    route = draws.choice(["queue/join", "queue/join", "call/restore_file", "call/describe_file", "cancel", "reset"])
    attack.send("POST", f"{API}/{route}", content=draws.choice(bodies))


def stolen_file(attack: Attack) -> None:
    """The file is none that was uploaded."""
    own = attack.file()
    paths = ["/etc/hostname", "../../../etc/hostname", "/proc/self/environ", "/dev/zero", "/dev/stdin", "docs/app.md"]
    paths += [attack.address, f"{attack.address}{API}/config", "file:///etc/hostname", "data:image/png;base64,AAAA"]
    paths += [
        f"{own['path']}/../../..",
        own["path"].rpartition("/")[0],
        own["path"] + "\0",
        "",
        "/" * 5000,
        "a" * 10**5,
    ]
    names = [
        "../../x.png",
        "a/b.png",
        "a" * 300 + ".png",
        "\0.png",
        ".png",
        "..",
        "",
        "x" * 10**5,
        "nul",
        "\u202egnp.x",
    ]
    names += ["<img src=x onerror=alert(1)>.png"]
    file = {"path": attack.draws.choice(paths)} if attack.draws.random() < 0.6 else own
    if file is own:
        file["orig_name"] = attack.draws.choice([*names, junk(attack.draws)])
    if attack.draws.random() < 0.3:
        file |= {"url": "http://169.254.169.254/latest", "is_stream": True, "mime_type": "image/svg+xml", "meta": {}}
    attack.judge(*body_of(attack.visitor.post(file)))


def odd_picture(attack: Attack) -> None:
    """The file is malformed, or far larger than it looks."""
    draws = attack.draws
    if draws.random() < 0.6:
        odd = draws.choice([each for each in odd_files(40, draws.getrandbits(32)) if isinstance(each.content, bytes)])
        name, content = f"odd{odd.suffix}", odd.content
    else:
        rows = zlib.compress(b"\0" * 2 * 10**6)
        name, content = "thin.png", png((b"IDAT", rows), width=1, height=10**6)
    file = attack.visitor.upload(name, content)
    answer = attack.visitor.post(file, scale=draws.choice([1, 4, 8]), steps=draws.choice([1, 2]))
    attack.judge(*body_of(answer))
    if answer.status_code == 200:
        attack.visitor.wait(answer.json()["event_id"], seconds=3)


def bad_upload(attack: Attack) -> None:
    """An upload that is malformed, too large, or breaks off."""
    draws, path = attack.draws, f"{API}/upload"
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\nabc\r\n'
    form = {"content-type": "multipart/form-data; boundary=x"}
    bodies = [
        b"",
        b"--x--",
        part % b"a.png",
        part % b"../../x.png" + b"--x--\r\n",
        part % b"" + b"--x--\r\n",
        b"\0" * 1000,
    ]
    bodies += [
        part % b"a.png" * 300 + b"--x--\r\n",
        part % (b"a" * 9000) + b"--x--\r\n",
        part.replace(b"name=", b"n=") % b"a",
    ]
    bodies += [b'--x\r\nContent-Disposition: form-data; name="files"\r\n\r\nabc\r\n--x--\r\n']
    choice = draws.randrange(5)
    if choice == 0:
        headers = draws.choice([{}, {"content-type": "multipart/form-data"}, {"content-type": "text/plain"}])
        attack.send("POST", path, content=b"abc", headers=headers)
    elif choice == 1:
        attack.send("POST", path, content=iter([b"abc"] * 3), headers=form)  # without a length
    elif choice == 2:
        head = f"POST {path} HTTP/1.1\r\nHost: {urlsplit(attack.address).netloc}\r\nContent-Length: %d\r\n"
        head += "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        attack.raw((head % draws.choice([10**5, 10**12])).encode() + part % b"a.png" + b"a" * draws.randrange(50000))
    else:
        attack.send("POST", path, content=draws.choice(bodies), headers=form)


def other_route(attack: Attack) -> None:
    """An address or a method that the page has no use for."""
    draws = attack.draws
    reads = [
        "file=/etc/passwd",
        "file=../../etc/passwd",
        "proxy=http://127.0.0.1:1/",
        "file=http://127.0.0.1:1/x",
        "queue/data",
    ]
    reads += [
        "queue/data?session_hash=" + "x" * 5000,
        "heartbeat/" + "x" * 500,
        "call/restore_file/none",
        "openapi.json",
    ]
    reads += [
        "custom_component/x/y/z/w",
        "stream/a/b/c/playlist.m3u8",
        "run-history/records",
        "upload_progress?upload_id=no",
    ]
    posts = [
        "run/restore_file",
        "api/restore_file",
        "component_server",
        "call/v2/restore_file",
        "process_recording",
        "stream/x",
    ]
    posts += ["vibe-edit", "vibe-code", "run-history/connect", "call/none", "call/lambda"]
    others = [
        "/monitoring",
        "/login",
        "/docs",
        "/static/../../../etc/passwd",
        "/assets/..%2f..%2fx",
        "/%00",
        "//x",
        "/config?x=\ud800",
    ]
    choice = draws.randrange(4)
    if choice == 0:
        attack.send("GET", f"{API}/{draws.choice(reads)}")
    elif choice == 1:
        attack.send(
            "POST", f"{API}/{draws.choice(posts)}", json={"data": [], "fn_name": "preprocess", "component_id": 1}
        )
    elif choice == 2:
        attack.send(
            draws.choice(["PUT", "DELETE", "OPTIONS", "TRACE", "PATCH"]), draws.choice(["/", f"{API}/queue/join"])
        )
    else:
        attack.send("GET", draws.choice(others).encode("utf-8", "replace").decode())


def bad_head(attack: Attack) -> None:
    """The request's head is of another site, or malformed."""
    draws, host = attack.draws, urlsplit(attack.address).netloc.encode()
    heads = [
        b"Host: evil.example",
        b"Host: " + host + b"\r\nOrigin: http://evil.example",
        b"Host: a\r\nHost: b",
        b"X: y",
    ]
    heads += [b"Host: " + host + b"\r\nOrigin: null", b"Host: [::1", b"Host: " + host + b"\r\nX: " + b"a" * 10**5]
    heads += [
        b"Host: " + host + b"\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: eA==",
        b"Host: @",
    ]
    line = draws.choice(
        [b"GET / HTTP/1.1", b"POST /gradio_api/queue/join HTTP/1.1\r\nContent-Length: 2", b"GET /config HTTP/1.0"]
    )
    attack.raw(line + b"\r\n" + draws.choice([*heads, draws.randbytes(300)]) + b"\r\n\r\n{}")


def left_alone(attack: Attack) -> None:
    """Much work is asked for, and whoever asked leaves, cancels, or never waits for it."""
    draws = attack.draws
    visitor = Visitor(attack.address, f"gone{draws.getrandbits(32)}")
    large = BytesIO()
    Image.effect_noise((draws.choice([60, 120]), 100), 50).save(large, "PNG")
    answer = visitor.post(visitor.upload("large.png", large.getvalue()), scale=8, steps=draws.choice([50, 100]))
    attack.judge(*body_of(answer))
    if answer.status_code != 200:
        return visitor.http.close()
    event, end = answer.json()["event_id"], draws.randrange(3)
    if end == 0:
        visitor.wait(event, seconds=draws.random())
    elif end == 1:
        body = {"session_hash": visitor.session, "fn_index": 0, "event_id": event}
        attack.send("POST", f"{API}/cancel", json=body)
    visitor.http.close()


def body_of(answer: httpx.Response) -> tuple[int, str]:
    """Returns an answer's status and text."""
    return answer.status_code, answer.text


KINDS = [wrong_value, stolen_file, wrong_body, odd_picture, bad_upload, other_route, bad_head, left_alone]
