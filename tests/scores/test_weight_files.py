"""Tests of downloads, from a server on this machine."""

import hashlib
import http.server
import io
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.prepare import check, metrics
from dit4sr_pl.scores.weight_files import Weights, check_metrics, download


def archive(contents: bytes) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w") as zipped:
        zipped.writestr("data.pkl", contents)
    return file.getvalue()


CONTENTS = archive(bytes(range(256)) * 4096)
PAGE = b"<html>please log in</html>"
SHA256 = hashlib.sha256(CONTENTS).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENTS as `/file`, only its first half as `/half`, all of it in chunks as `/chunks`, and a page of HTML
    as `/page`, and counts the requests.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests += 1
        if self.path not in ("/file", "/half", "/chunks", "/page"):
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Connection", "close")
        if self.path == "/chunks":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            return self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(CONTENTS), CONTENTS))
        contents = PAGE if self.path == "/page" else CONTENTS
        self.send_header("Content-Length", str(len(contents)))
        self.end_headers()
        self.wfile.write(contents[: len(contents) // 2 if self.path == "/half" else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests = 0
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.shutdown()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("sha256", [SHA256, None], ids=["hash", "no hash"])
def test_a_download_that_was_cut_off_leaves_nothing_and_begins_anew(server, tmp_path, sha256):
    path = tmp_path / "file"
    with pytest.raises(ValueError, match=f"cut off after {len(CONTENTS) // 2} of {len(CONTENTS)} bytes; run it again"):
        download(f"{server.url}/half", path, sha256)
    assert names(tmp_path) == []
    download(f"{server.url}/file", path, sha256)
    assert path.read_bytes() == CONTENTS and names(tmp_path) == ["file"]


def test_another_file_is_not_kept(server, tmp_path):
    with pytest.raises(ValueError, match="the server sent another file"):
        download(f"{server.url}/file", tmp_path / "file", "00")
    assert names(tmp_path) == []


@pytest.mark.parametrize("sha256", [SHA256, None], ids=["hash", "no hash"])
def test_a_portals_page_is_not_taken_for_weights(server, tmp_path, sha256):
    with pytest.raises(ValueError, match="the server sent another file, such as a login page"):
        download(f"{server.url}/page", tmp_path / "file", sha256)
    assert names(tmp_path) == []
    (tmp_path / "file").write_bytes(CONTENTS[:-1])  # as versions before 0.2 may have left it
    with pytest.raises(ValueError, match="file: truncated or (no file of weights|another file)"):
        download(f"{server.url}/file", tmp_path / "file", sha256)


def test_an_answer_without_a_length_is_read_to_its_end(server, tmp_path):
    assert download(f"{server.url}/chunks", tmp_path / "file", None)
    assert (tmp_path / "file").read_bytes() == CONTENTS


def test_two_processes_download_a_file_once(server, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: download(f"{server.url}/file", tmp_path / "file", SHA256), range(2)))
    assert sorted(done) == [False, True] and server.requests == 1 and names(tmp_path) == ["file"]


def prepared(server, folder: Path, *paths: str):
    """Returns the config of `prepare stage=metrics` for one metric whose files are on the server."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("prepare", ["stage=metrics", "metrics=[psnr,musiq]", f"metric_weights.folder={folder}"])
    cfg.metrics.musiq.weights.files = [{"url": f"{server.url}/{path}", "sha256": SHA256} for path in paths]
    return cfg


def test_prepare_downloads_what_is_missing_and_says_what_was_there(server, tmp_path, capsys):
    cfg = prepared(server, tmp_path / "weights", "file")
    for state in ("downloaded", "was there"):
        check(cfg)
        metrics(cfg, (1, 1))
        assert capsys.readouterr().out == f"{tmp_path / 'weights' / 'file'}: {state}\n"
    assert server.requests == 1
    check_metrics(cfg.metrics)


def test_prepare_names_all_that_failed_and_downloads_the_rest(server, tmp_path, capsys):
    cfg = prepared(server, tmp_path, "nowhere", "file", "lost")
    with pytest.raises(ValueError) as error:
        metrics(cfg, (1, 1))
    message = str(error.value)
    assert f"copy them into {tmp_path}" in message and names(tmp_path) == ["file"]
    for path in ("nowhere", "lost"):
        assert f"{path} from {server.url}/{path} (HTTP Error 404" in message


def test_a_file_of_other_contents_is_refused_before_a_run(server, tmp_path):
    (tmp_path / "file").write_bytes(CONTENTS[:-1])
    weights = prepared(server, tmp_path, "file").metrics.musiq.weights
    for on_missing in ("stop", "skip"):
        with pytest.raises(ValueError, match="truncated or another file"):
            Weights(weights.folder, on_missing, weights.files).check("musiq")
    with pytest.raises(ValueError, match=r"not downloaded; copy them into .*truncated or another file"):
        metrics(prepared(server, tmp_path, "file"), (1, 1))
