"""Requests to a page that is served: what is refused, what ends early, and what is left."""

import threading
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import httpx
import imagecodecs
import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from PIL import GifImagePlugin, Image, TiffImagePlugin

from dit4sr_pl.model import DiT4SRTransformer, Variant
from dit4sr_pl.page import blocks, visitors
from dit4sr_pl.page.worker import Stopped, Worker
from dit4sr_pl.restoration.pictures import PictureRestorer
from dit4sr_pl.restoration.reading import reading
from dit4sr_pl.restoration.restorer import Restorer
from dit4sr_pl.restoration.worklist import Entry
from testing.hostile_requests import Attack
from testing.networks import randomise
from testing.odd_files import png
from testing.pages import API, LIMITS, Visitor, has_ipv6, make_page, serving
from testing.toy_runs import SAMPLER


@pytest.fixture(scope="module")
def restorer(toy_backbone):
    net = DiT4SRTransformer(toy_backbone.transformer, Variant()).eval()
    randomise(net.trained)
    return Restorer(net, toy_backbone, replace(SAMPLER, color="adain"))


@pytest.fixture(scope="module")
def page(restorer, tmp_path_factory):
    captioner = lambda images: [f"An image of {tuple(images[0].shape)}."]  # noqa: E731
    return make_page(restorer, tmp_path_factory.mktemp("page"), captioner)


@pytest.fixture(scope="module")
def address(page):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(page.folder.path))
        patch.setattr(visitors, "GRACE", 0.1)
        with serving(page) as address:
            yield address


@pytest.fixture
def visitor(address, request):
    visitor = Visitor(address, f"test{abs(hash(request.node.name))}")
    with visitor.http:
        yield visitor


@pytest.fixture
def evaluations(restorer):
    """The number of tiles in each call of the network."""
    tiles = []
    handle = restorer.net.register_forward_pre_hook(lambda _, inputs: tiles.append(len(inputs[0])))
    yield tiles
    handle.remove()


def picture(height: int, width: int) -> bytes:
    file = BytesIO()
    Image.effect_noise((width, height), 60).save(file, "PNG")
    return file.getvalue()


def files(page) -> list[Path]:
    return [path for path in page.folder.path.rglob("*") if path.is_file()]


def eventually(condition) -> bool:
    """Returns whether something becomes true within ten seconds."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("name", ["wow!.png", "a$b{c} #é%41.png", ".png", "nul.png", "a..png"])
def test_a_file_on_the_page_is_the_file_that_restore_writes_whatever_its_name(visitor, restorer, tmp_path, name):
    levels = np.random.default_rng(0).integers(0, 65536, (9, 7, 4), dtype=np.uint16)
    (tmp_path / name).write_bytes(imagecodecs.png_encode(levels))
    file = visitor.upload(name, (tmp_path / name).read_bytes())
    kind, data = visitor.restore(file, scale=2, caption="a cat", steps=2, color="adain", seed=3)
    assert kind == "complete"
    stem = Path(name).stem
    chosen = Restorer(restorer.net, restorer.backbone, replace(restorer.sampler, steps=2))
    entry = Entry(tmp_path / name, tmp_path / "out" / f"{stem}.png", stem, (9, 7), True, "a cat")
    with reading([[entry]]) as batches:
        outcomes = list(PictureRestorer(chosen, 2, "bicubic", 3).run(batches, lambda _: None))
    assert [outcome.failure for outcome in outcomes] == [None]
    assert visitor.download(data[0][1]) == entry.target.read_bytes()
    assert [each["orig_name"] for each in data[0]] == [f"{stem}.bicubic.png", f"{stem}.png"]


@pytest.mark.parametrize(("guidance", "size", "scale"), [(1.0, (20, 24), 2), (3.0, (40, 90), 8), (3.0, (90, 11), 5)])
def test_the_budget_counts_what_the_network_does(restorer, evaluations, guidance, size, scale):
    chosen = Restorer(restorer.net, restorer.backbone, replace(restorer.sampler, steps=2, guidance_scale=guidance))
    result = tuple(side * scale for side in size)
    chosen(torch.rand(1, 3, *size), result, [""], ["a"], 0)
    assert sum(evaluations) == chosen.tile_evaluations(size, result) > 0


def test_work_beyond_the_budget_is_refused_before_anything_is_computed(visitor, restorer, evaluations, page):
    thin = visitor.upload("thin.png", png((b"IDAT", b""), width=1, height=10**6))
    assert "1x1000000 pixels: at most" in visitor.restore(thin)[1]["error"]
    large = visitor.upload("large.png", picture(500, 500))
    assert "2000x2000 pixels: at most 1000000 are restored" in visitor.restore(large, scale=4)[1]["error"]
    many = replace(page, limits=replace(LIMITS, max_evaluations=99))
    chosen = Restorer(restorer.net, restorer.backbone, replace(restorer.sampler, steps=50, guidance_scale=2.0))
    with pytest.raises(
        ValueError, match="100x100 pixels in 50 steps take 100 evaluations of the network, and one .* 99"
    ):
        many.check_work(chosen, (50, 50), (100, 100))
    small = Restorer(restorer.net, restorer.backbone, replace(restorer.sampler, process_size=512))
    with pytest.raises(ValueError, match="pixels: at most"):  # a line of pixels, enlarged until its short side has 512
        page.check_work(small, (1, 1000), (4, 4000))
    assert evaluations == []


def test_a_picture_with_more_pixels_than_its_header_says_is_refused(page, monkeypatch, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(8, 8))
    monkeypatch.setattr(blocks, "read_header", lambda _: type("Header", (), {"size": (8, 4)}))
    with pytest.raises(ValueError, match="not as many as its header says"):
        page.restored(tmp_path / "a.png", "a.png", 1, "", 0, {"steps": 1}, print)


@pytest.mark.parametrize("format", ["GIF", "TIFF", "WEBP", "PNG"])
def test_frames_are_not_counted(visitor, monkeypatch, format):
    """Counting 200,000 of them would hold the device for more than a second, and for a minute in the largest file."""
    file = BytesIO()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "white")]
    frames[0].save(file, format, save_all=True, append_images=frames[1:])
    seeks = []
    for plugin in (GifImagePlugin.GifImageFile, TiffImagePlugin.TiffImageFile):
        seek = plugin._seek
        monkeypatch.setattr(
            plugin, "_seek", lambda *given, seek=seek, **options: seeks.append(1) or seek(*given, **options)
        )
    kind, data = visitor.restore(visitor.upload(f"a.{format.lower()}", file.getvalue()))
    assert kind == "error" and "several frames or pages; save one of them" in data["error"]
    assert len(seeks) <= 4


@pytest.mark.parametrize("end", ["leaves", "cancels", pytest.param("never waits", marks=pytest.mark.slow)])
def test_work_ends_within_a_step_when_nobody_waits_for_it(visitor, evaluations, page, monkeypatch, end):
    monkeypatch.setattr(blocks, "PATIENCE", 1 if end == "never waits" else 60)
    before = files(page)
    event = visitor.join(visitor.upload("a.png", picture(90, 90)), scale=8, steps=100)
    assert eventually(lambda: evaluations)
    if end == "leaves":
        assert visitor.wait(event, seconds=0.2) == ("left", None)
    elif end == "cancels":
        body = {"session_hash": visitor.session, "fn_index": 0, "event_id": event}
        waiting = threading.Thread(target=visitor.wait, args=(event,))
        waiting.start()
        assert visitor.http.post(f"{API}/cancel", json=body).json() == {"success": True}
        waiting.join(10)
        assert not waiting.is_alive()
    assert eventually(lambda: not page.worker.lock.locked())
    done = len(evaluations)
    assert 0 < done < 100
    time.sleep(0.3)
    assert len(evaluations) == done and eventually(lambda: files(page) == before)


def test_work_that_waits_for_the_device_ends_too(page):
    with page.worker.working(lambda: True, 60):
        for wanted in (lambda: False, iter([True, True, False]).__next__):
            with pytest.raises(Stopped), page.worker.working(wanted, 60):
                raise AssertionError("two works at once")


def test_work_ends_when_its_time_is_over_or_the_server_ends():
    layer = torch.nn.Linear(1, 1)
    worker = Worker([layer])
    layer(torch.ones(1))
    with (
        pytest.raises(ValueError, match="not done after 0.1 seconds, the page's max_seconds"),
        worker.working(lambda: True, 0.1),
    ):
        layer(torch.ones(1))
        time.sleep(0.15)
        layer(torch.ones(1))
    with pytest.raises(Stopped), worker.working(lambda: True, 60):
        worker.end()
        layer(torch.ones(1))
    layer(torch.ones(1))


def test_uploads_go_with_their_request_or_with_the_page_that_sent_them(visitor, page):
    file = visitor.upload("a.png", picture(8, 8))
    assert visitor.restore(file)[0] == "complete" and eventually(lambda: not Path(file["path"]).exists())
    assert "choose the file again" in visitor.post(file).json()["detail"]
    before = files(page)
    with visitor.http.stream("GET", f"{API}/heartbeat/{visitor.session}") as beat:
        lines = beat.iter_lines()  # the connection is open as long as this is not deleted
        next(lines)
        file = visitor.upload("a.png", picture(8, 8))
        shown = [visitor.restore(file, seed=seed)[1][0][1] for seed in (1, 2)]
        assert Path(file["path"]).exists() and [Path(each["path"]).exists() for each in shown] == [False, True]
        assert len(visitor.download(shown[1])) > 100
    assert eventually(lambda: files(page) == before)


def test_what_comes_from_elsewhere_is_refused(visitor):
    get = lambda **headers: visitor.http.get("/config", headers=headers)  # noqa: E731
    assert get().status_code == get(origin=visitor.address).status_code == get(host="page.example").status_code == 200
    rebound = get(host="evil.example:7931")
    assert get(**{"x-forwarded-host": "page.example"}).status_code == 200
    assert get(**{"x-forwarded-host": "page.example, evil.example"}).status_code == 400
    assert rebound.status_code == 400 and "access-control-allow-origin" not in rebound.headers
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        answer = visitor.http.post(f"{API}/upload", files={"files": b"x"}, headers={"origin": origin})
        assert answer.status_code == 403 and "another site" in answer.json()["detail"]
    asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    assert visitor.http.options(f"{API}/queue/join", headers=asked).status_code == 403


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "run/restore_file", 404),  # past the queue
        ("POST", "api/restore_file", 404),
        ("POST", "component_server", 404),
        ("GET", "proxy=http://127.0.0.1:1/", 404),
        ("GET", "file=/etc/hostname", 404),
        ("GET", "file=http://127.0.0.1:1/", 404),
        ("GET", "run-history/records", 404),
        ("GET", "queue/join", 405),
        ("DELETE", "info", 405),
        ("GET", "heartbeat/" + "x" * 65, 400),
        ("GET", "queue/data?session_hash=" + "x" * 65, 400),
    ],
)
def test_only_what_the_page_needs_is_answered(visitor, method, path, status):
    answer = visitor.http.request(method, f"{API}/{path}", json={"data": []} if method == "POST" else None)
    assert answer.status_code == status and set(answer.json()) == {"detail"}


def test_bounds_hold_for_requests_that_no_browser_sends(visitor, evaluations, page):
    file = visitor.upload("a.png", picture(8, 8))
    wrong = [
        ("scale", 9),
        ("scale", "4"),
        ("steps", 0),
        ("steps", 101),
        ("steps", 1.5),
        ("guidance", 1e308),
        ("seed", 2**64),
    ]
    wrong += [
        ("seed", None),
        ("color", "red"),
        ("color", ["adain"]),
        ("caption", "x" * 2001),
        ("no", {"a": 1}),
        ("scale", {}),
    ]
    for key, value in wrong:
        answer = visitor.post(file, **{key: value})
        assert answer.status_code == 400 and "\n" not in answer.json()["detail"] and len(answer.text) < 300
    assert visitor.post(file, scale=float("nan")).status_code == 400
    assert visitor.post(file, caption="x" * 3 * 10**6).status_code == 413
    assert visitor.post(file, caption="\ud800").status_code == 400
    body = {"data": [file], "fn_index": 0, "session_hash": "a", "trigger_id": None}
    for change in (
        {"fn_index": 99},
        {"fn_index": True},
        {"session_hash": None},
        {"session_hash": "../x"},
        {"data": {}},
    ):
        assert visitor.http.post(f"{API}/queue/join", json=body | change).status_code in (400, 404)
    for content in (b"", b"[]", b"{", b"[" * 10**5, b"\xff"):
        assert visitor.http.post(f"{API}/queue/join", content=content).status_code == 400
    assert evaluations == []
    page.folder.leave(visitor.session, results=True)


def test_uploads_say_their_length_and_have_a_total(visitor, page, monkeypatch):
    def send(content, length: str | None, kind: str = "multipart/form-data; boundary=x") -> int:
        headers = {"content-type": kind} | ({} if length is None else {"content-length": length})
        return visitor.http.post(f"{API}/upload", content=content, headers=headers).status_code

    assert send(b"x", None, "text/plain") == 415
    assert send(iter([b"--x--"]), None) == 411
    assert send(b"x" * 1_100_000, "1100000") == 413
    before = files(page)
    monkeypatch.setattr(page.folder, "most", 10)
    with pytest.raises(httpx.HTTPStatusError, match="507"):
        visitor.upload("a.png", picture(8, 8))
    assert files(page) == before


def test_a_full_queue_says_so_and_the_rest_is_served(visitor, page):
    with page.worker.working(lambda: True, 60):  # the first of these waits for the device, the others behind it
        file, answers = visitor.upload("a.png", picture(8, 8)), []
        for number in range(9):
            visitor.session = f"waiting{number}"
            answers.append(visitor.post(file))
    codes = [answer.status_code for answer in answers]
    assert set(codes[:5]) == {200} and codes[-1] == 503 and "full" in answers[-1].text
    for number, answer in enumerate(answers):
        if answer.status_code == 200:
            assert visitor.wait(answer.json()["event_id"])[0] == "complete"
            page.folder.leave(f"waiting{number}", results=True)


def test_messages_are_no_markup_and_name_no_folder_of_the_server(visitor):
    kind, data = visitor.restore(visitor.upload("<b>.png", b"no image"))
    assert kind == "error" and data["error"] == "&lt;b&gt;.png: not a readable image (unknown format)"


@pytest.mark.slow
def test_hostile_requests_are_answered_in_a_line_and_leave_the_worker_free(address, page, capfd):
    attack = Attack(address, probe_every=6)
    with attack.visitor.http:
        attack.run(48)
    assert attack.wrong == []
    assert "Traceback" not in "".join(capfd.readouterr())
    assert eventually(lambda: not page.worker.lock.locked()) and attack.longest_hold < 15
    assert page.folder.used() < 10**8


def test_a_button_describes_the_image_within_the_same_limits(visitor):
    def describe(name: str, content: bytes) -> tuple[str, object]:
        answer = visitor.http.post(f"{API}/call/describe_file", json={"data": [visitor.upload(name, content)]})
        return visitor.wait(answer.json()["event_id"])

    assert describe("a.png", picture(8, 12)) == ("complete", ["An image of (3, 8, 12)."])
    assert "at most 1000000 are restored" in describe("b.png", png((b"IDAT", b""), width=1, height=10**6))[1]["error"]
    assert describe("c.png", picture(8, 8)[:-30])[1]["error"].startswith("c.png: not a readable image")


@pytest.mark.slow
@pytest.mark.parametrize("host", ["::1", "[::1]", "0.0.0.0"])
def test_the_address_that_is_printed_opens_the_page(host, restorer, tmp_path):
    if ":" in host and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    with serving(make_page(restorer, tmp_path), host) as address:
        assert httpx.get(address, trust_env=False).status_code == 200


@pytest.mark.slow
def test_gradios_own_client_restores_a_picture(address, tmp_path):
    (tmp_path / "a b.png").write_bytes(picture(8, 12))
    client = Client(address, verbose=False, download_files=str(tmp_path))
    values = handle_file(tmp_path / "a b.png"), 2, "", 1, 1.0, "none", 0, "", ""
    files = client.predict(*values, api_name="/restore_file")
    client.close()
    for file, name in zip(files, ("a b.bicubic.png", "a b.png"), strict=True):
        with Image.open(file) as image:
            assert image.size == (24, 16) and Path(file).name == name
