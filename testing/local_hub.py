"""A Hugging Face hub on this machine: a thread that answers `huggingface_hub` when it reads and writes models.

    hub = LocalHub()
    hub.add("acceptee/DiT4SR", folder)                  # a commit on `main`
    with serving(hub, monkeypatch, tmp_path): ...       # huggingface_hub asks this hub and caches below tmp_path

It knows no Xet storage, so `serving` switches Xet off: large files go through Git LFS.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import huggingface_hub.hf_api
from huggingface_hub import constants

TOKEN = "hf_toy"
LFS = (".safetensors", ".png")  # files that are uploaded through Git LFS


@dataclass
class Repo:
    """A model on the hub.

    Args:
        commits: files by path, by commit.
        refs: commit by branch or tag.
        gated: whether a token is needed that accepted a licence.
        private: whether it exists for its owner's token alone.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], revision: str = "main") -> str:
        """Makes a commit of the files that a branch has and new ones, and returns it."""
        files = self.commits.get(self.refs.get(revision, ""), {}) | files
        content = json.dumps([len(self.commits), *sorted(files), *map(digest, files.values())])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha], self.refs[revision] = files, sha
        return sha


class LocalHub(ThreadingHTTPServer):
    """The hub.

    Attributes:
        repos: models by id.
        accepted: tokens that accepted the licences of gated models.
        requests: method and path of every request.
        sent: bytes of files that were sent.
        cut: bytes of a file after which the connection is closed; None: never.
        cuts: how many times `cut` still applies.
        broken: whether every request is answered with error 503.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, bytes] = {}
        self.accepted: set[str] = set()
        self.requests: list[str] = []
        self.sent, self.cut, self.cuts, self.broken = 0, None, 0, False
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)

    @property
    def endpoint(self) -> str:
        """The address that HF_ENDPOINT would hold."""
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, folder: Path, below: str = "", revision: str = "main", gated: bool = False) -> str:
        """Commits a folder's files to a model, which is made if it does not exist, and returns the commit."""
        repo = self.repos.setdefault(name, Repo())
        repo.gated = gated
        files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
        return repo.commit({below + name: file.read_bytes() for name, file in files.items()}, revision)


class Handler(BaseHTTPRequestHandler):
    """The answers to one connection."""

    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, *_) -> None:
        """Prints nothing."""

    def do_GET(self) -> None:
        """Answers reading requests."""
        self.dispatch(
            {
                r"/api/whoami-v2": self.whoami,
                r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?": self.info,
                r"/api/models/([^/]+/[^/]+)/tree/([^/]+)": self.tree,
                r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self.resolve,
            }
        )

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Answers writing requests."""
        self.dispatch(
            {
                r"/api/validate-yaml": self.validate,
                r"/api/repos/create": self.create,
                r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)": self.preupload,
                r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": self.batch,
                r"/lfs/verify": self.verify,
                r"/api/models/([^/]+/[^/]+)/commit/([^/]+)": self.commit,
            }
        )

    def do_PUT(self) -> None:
        """Takes the bytes of a large file."""
        self.content = None
        body = self.body()
        self.server.uploads[hashlib.sha256(body).hexdigest()] = body
        self.answer({})

    def dispatch(self, routes: dict) -> None:
        """Calls the first method whose pattern is the request's path, with its groups."""
        path, self.content = urlparse(self.path).path, None
        self.server.requests.append(f"{self.command} {path}")
        if self.server.broken:
            return self.refuse(503)
        for pattern, method in routes.items():
            if match := re.fullmatch(pattern, path):
                return method(*(group and unquote(group) for group in match.groups()))
        return self.refuse(404)

    @property
    def token(self) -> str | None:
        """The token that came with the request."""
        return (self.headers["Authorization"] or "").removeprefix("Bearer ") or None

    def body(self) -> bytes:
        """Returns what was sent, in one piece or in chunks; a request's body is read once."""
        if self.content is None and self.headers["Transfer-Encoding"] == "chunked":
            self.content = b""
            while size := int(self.rfile.readline(), 16):
                self.content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        elif self.content is None:
            self.content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        return self.content

    def answer(self, content: dict | list, status: int = 200) -> None:
        """Sends JSON."""
        self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str = "") -> None:
        """Sends an error with the hub's code for it."""
        self.body()
        self.send(status, b"", {"X-Error-Code": code} if code else {})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        """Sends an answer."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def find(self, name: str, revision: str | None) -> tuple[Repo, str] | None:
        """Returns a model and a commit; None: the request was refused."""
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self.token != TOKEN):
            # The hub does not tell strangers whether a model exists.
            self.refuse(401 if self.token is None else 404, "RepoNotFound")
            return None
        commit = revision if revision in repo.commits else repo.refs.get(revision or "main")
        if commit is None:
            self.refuse(404, "RevisionNotFound")
            return None
        return repo, commit

    def whoami(self) -> None:
        """Says whose token it is."""
        if self.token != TOKEN:
            return self.refuse(401)
        return self.answer({"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}})

    def info(self, name: str, revision: str | None) -> None:
        """Describes a model; that of a gated one is open to everyone."""
        if found := self.find(name, revision):
            repo, commit = found
            siblings = [{"rfilename": path} for path in sorted(repo.commits[commit])]
            self.answer({"id": name, "sha": commit, "private": repo.private, "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        """Lists the files of a commit, with those in folders."""
        if found := self.find(name, revision):
            files = sorted(found[0].commits[found[1]].items())
            self.answer([{"type": "file", "path": path, "size": len(c), "oid": digest(c)} for path, c in files])

    def resolve(self, name: str, revision: str, path: str) -> None:
        """Sends a file, from where the request's range begins."""
        if not (found := self.find(name, revision)):
            return
        repo, commit = found
        if repo.gated and self.token not in self.server.accepted:
            return self.refuse(403 if self.token else 401, "GatedRepo")
        if path not in repo.commits[commit]:
            return self.refuse(404, "EntryNotFound")
        content = repo.commits[commit][path]
        headers = {"ETag": f'"{digest(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if begin:
            first = int(begin[1])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            content = content[first:]
        if self.command == "GET":
            if self.server.cuts and self.server.cut < len(content):
                return self.send_half(content, headers)
            self.server.sent += len(content)
        self.send(206 if begin else 200, content, headers)

    def send_half(self, content: bytes, headers: dict[str, str]) -> None:
        """Promises a file, sends `cut` bytes of it, and closes the connection."""
        self.server.cuts -= 1
        self.server.sent += self.server.cut
        self.send_response(206 if "Content-Range" in headers else 200)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content[: self.server.cut])
        self.close_connection = True

    def validate(self) -> None:
        """Accepts a model card's metadata."""
        self.body()
        self.answer({"errors": [], "warnings": []})

    def create(self) -> None:
        """Makes a model in the namespace of the token's owner."""
        asked = json.loads(self.body())
        owner = asked.get("organization") or "me"
        if self.token != TOKEN or owner != "me":
            return self.refuse(401 if self.token is None else 403)
        name = f"{owner}/{asked['name']}"
        known = name in self.server.repos
        if not known:
            self.server.repos[name] = Repo(private=asked.get("visibility") == "private")
            self.server.repos[name].commit({".gitattributes": b""})
        return self.answer({"url": f"{self.server.endpoint}/{name}"}, 409 if known else 200)

    def preupload(self, name: str, revision: str) -> None:
        """Says which files are to be sent through Git LFS."""
        if not self.find(name, revision):
            return
        files = json.loads(self.body())["files"]
        mode = lambda path: "lfs" if path.endswith(LFS) else "regular"  # noqa: E731
        modes = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in files]
        self.answer({"files": modes})

    def batch(self, name: str) -> None:
        """Says where to put large files."""
        objects = json.loads(self.body())["objects"]
        to = lambda place: {"href": f"{self.server.endpoint}/lfs/{place}"}  # noqa: E731
        actions = {"upload": to("put"), "verify": to("verify")}
        self.answer({"transfer": "basic", "objects": [each | {"actions": actions} for each in objects]})

    def verify(self) -> None:
        """Confirms that a large file has come."""
        self.body()
        self.answer({})

    def commit(self, name: str, revision: str) -> None:
        """Makes a commit of files that came with the request or through Git LFS."""
        if not (found := self.find(name, revision)):
            return
        lines = [json.loads(line) for line in self.body().splitlines()]
        values = {"file": [], "lfsFile": []}
        for line in lines:
            values.setdefault(line["key"], []).append(line["value"])
        files = {each["path"]: base64.b64decode(each["content"]) for each in values["file"]}
        files |= {each["path"]: self.server.uploads[each["oid"]] for each in values["lfsFile"]}
        sha = found[0].commit(files, revision)
        self.answer({"commitUrl": f"{self.server.endpoint}/{name}/commit/{sha}", "commitOid": sha})


def digest(content: bytes) -> str:
    """Returns a file's ETag."""
    return hashlib.sha256(content).hexdigest()


@contextmanager
def serving(hub: LocalHub, monkeypatch, folder: Path) -> Iterator[LocalHub]:
    """Lets `huggingface_hub`, which read its environment when it was imported, ask this hub and cache below a folder.

    The environment is set too, for what reads it later and for processes that are started.
    """
    home = folder / "huggingface"
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)  # of functions such as `model_info`
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name, value in {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    hub.thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
