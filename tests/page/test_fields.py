"""Values that visitors send, names under which the page answers, and its folder."""

import errno
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from dit4sr_pl.common.processes import signals_exit
from dit4sr_pl.page.fields import Limits, bytes_of, checked, choice, number, text, upload
from dit4sr_pl.page.folder import PageFolder, page_folder
from dit4sr_pl.page.hosts import Hosts, host_name, listen, url
from testing import ROOT
from testing.pages import has_ipv6

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def sent(tmp_path):
    file = tmp_path / "page" / ("a" * 64) / "photo.png"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"photo")
    return file


@pytest.mark.parametrize(
    "value", [None, True, "3", [3], {}, NAN, INF, -INF, 0, 101, -1, 2.5, 1e308, 10**400, -(10**400)]
)
def test_a_number_of_another_type_or_out_of_its_bounds_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"^steps=.{1,70}: must be a whole number from 1 to 100$"):
        number(1, 100, whole=True)(value, "steps")
    assert number(1, 100, whole=True)(7.0, "steps") == 7 and number(0, 30)(2.5, "guidance") == 2.5


@pytest.mark.parametrize("value", [1, True, ["a"], {}, "x" * 11])
def test_a_text_of_another_type_or_too_long_is_refused(value):
    with pytest.raises(ValueError, match="^caption"):
        text(10)(value, "caption")
    assert text(10)(None, "caption") == "" and text(10)("x" * 10, "caption") == "x" * 10
    with pytest.raises(ValueError, match="^color=.*: choose one of adain, none$"):
        choice(["adain", "none"])([value], "color")


def test_a_request_needs_each_value_once():
    fields = {"steps": number(1, 9), "caption": text(9)}
    assert checked(fields, [3, "a"]) == [3, "a"]
    for data in (None, {}, "3a", [], [3], [3, "a", 1]):
        with pytest.raises(ValueError, match="must be a list of 2 values: steps, caption"):
            checked(fields, data)


def test_only_uploaded_files_are_files_and_keep_their_names(sent, tmp_path):
    check, folder = upload(tmp_path / "page"), tmp_path / "page"
    (folder / "link.png").symlink_to("/etc/hostname")
    whole = {
        "path": str(sent),
        "url": "http://127.0.0.1/x",
        "is_stream": True,
        "meta": 1,
        "orig_name": "a$b{c} wow!.png",
    }
    expected = {"path": str(sent), "orig_name": "a$b{c} wow!.png", "meta": {"_type": "gradio.FileData"}}
    assert check(whole, "file") == expected
    assert check({"path": str(sent)}, "file")["orig_name"] == "photo.png"
    others = [
        "/etc/hostname",
        "/dev/zero",
        "",
        "x.png",
        str(folder),
        f"{sent}/../../..",
        f"{sent}\0",
        f"{folder}/link.png",
    ]
    others += [
        "http://127.0.0.1/",
        "file:///etc/hostname",
        f"{sent.parent}/../../page2/x",
        "/" * 5000,
        "a" * 10**5,
        5,
        [],
    ]
    for path in others:
        with pytest.raises(ValueError, match="^file: is not on the server"):
            check({"path": path}, "file")
    for value in (None, [], "x", 3, {}, {"path": None}):
        with pytest.raises(ValueError, match="^file: give an image$"):
            check(value, "file")
    for name in ("../x.png", "a/b.png", "..", "\0", "a" * 300, "a" * 250 + ".png", 3, [], {"a": 1}, "\ud800"):
        with pytest.raises(ValueError, match="^file: "):
            check({"path": str(sent), "orig_name": name}, "file")


def test_limits_are_numbers_and_hold_for_both_sides():
    limits = Limits(1000, 100, 10, 9, 9, 9, 9)
    limits.check_size((10, 100))
    for size in ((11, 100), (1, 101), (101, 1)):
        with pytest.raises(ValueError, match="at most 1000 are restored, and 100 along a side"):
            limits.check_size(size)
    for wrong in ("many", None, 0, -1, NAN, True):
        with pytest.raises(ValueError, match="max_pixels="):
            Limits(wrong, 100, 10, 9, 9, 9, 9)
    assert [bytes_of(size, "x") for size in (7, "7", "50mb", "2 GB", "1kb")] == [7, 7, 50 * 10**6, 2 * 10**9, 1000]
    for wrong in ("", "mb", "-1mb", "1.5gb", "0", None, "5 apples"):
        with pytest.raises(ValueError, match="max_stored="):
            bytes_of(wrong, "max_stored")


@pytest.mark.parametrize(
    ("host", "name", "allowed"),
    [
        ("127.0.0.1", "127.0.0.1:7860", True),
        ("127.0.0.1", "localhost", True),
        ("127.0.0.1", "LOCALHOST.:80", True),
        ("127.0.0.1", "[::1]:9", True),
        ("127.0.0.1", "evil.example:7860", False),
        ("127.0.0.1", "127.0.0.1.evil.example", False),
        ("127.0.0.1", "localhost@evil.example", False),
        ("127.0.0.1", "192.168.0.7", False),
        ("127.0.0.1", "page.example", True),
        ("::1", "[::1]:7860", True),
        ("[::1]", "[::1]", True),
        ("0.0.0.0", "192.168.0.7:7860", True),
        ("0.0.0.0", socket.gethostname(), True),
        ("::", "[fe80::1]:7860", True),
        ("0.0.0.0", "evil.example", False),
        ("127.0.0.1", None, False),
        ("127.0.0.1", "", False),
        ("127.0.0.1", "localhost:99999", False),
        ("127.0.0.1", "localhost/x", False),
        ("127.0.0.1", "[::1", False),
    ],
)
def test_the_page_answers_under_its_own_names_alone(host, name, allowed):
    assert Hosts.of(host, ["page.example"]).allows(name) is allowed


@pytest.mark.parametrize(
    ("origin", "host", "allowed"),
    [
        ("http://127.0.0.1:7860", "127.0.0.1:7860", True),
        ("http://[::1]:7860", "[::1]:7860", True),
        ("http://localhost", "localhost:80", True),
        ("http://127.0.0.1:3000", "127.0.0.1:7860", False),
        ("http://localhost:7860", "127.0.0.1:7860", False),
        ("http://evil.example", "127.0.0.1:7860", False),
        ("null", "127.0.0.1:7860", False),
        ("", "127.0.0.1:7860", False),
        ("file://", "127.0.0.1:7860", False),
        ("http://[", "127.0.0.1:7860", False),
        ("https://page.example", "127.0.0.1:7860", True),  # a proxy in front of the page
        ("https://page.example.evil", "page.example", False),
    ],
)
def test_only_the_page_itself_may_send_requests(origin, host, allowed):
    assert Hosts.of("127.0.0.1", ["page.example"]).allows_origin(origin, host) is allowed
    assert host_name("[::1]:7") == "::1"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", "http://127.0.0.1:7"),
        ("0.0.0.0", "http://127.0.0.1:7"),
        ("::1", "http://[::1]:7"),
        ("[::1]", "http://[::1]:7"),
        ("::", "http://[::1]:7"),
        ("page.example", "http://page.example:7"),
    ],
)
def test_the_printed_address_can_be_opened(host, expected):
    assert url(host, 7) == expected


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "0.0.0.0", "::"])
def test_a_page_can_be_served_on_every_kind_of_address(host):
    if ":" in host and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    with listen(host, 0) as place:
        port = place.getsockname()[1]
        name = url(host, port).removeprefix("http://").rpartition(":")[0].strip("[]")
        socket.create_connection((name, port), timeout=5).close()
        with pytest.raises(ValueError, match=f"port={port}: Address already in use; choose another"):
            listen(host, port)


def test_an_address_that_cannot_be_had_is_one_line(monkeypatch):
    for port in (-1, 65536, "abc", None, 7.5, True):
        with pytest.raises(ValueError, match=f"port={port}: must be a whole number from 0 to 65535"):
            listen("127.0.0.1", port)
    for host in ("no such host", "127.0.0.1:80", "[::1", "a" * 70, "192.0.2.1"):
        with pytest.raises(ValueError, match=re.escape(f"host={host} port=0: ") + "[^\n]*; choose another"):
            listen(host, 0)

    def privileged(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket, "create_server", privileged)
    with pytest.raises(ValueError, match="port=80: Permission denied; ports below 1024 are the system's"):
        listen("127.0.0.1", 80)


def test_the_folder_has_a_total_and_empty_files_count(tmp_path):
    folder = PageFolder(tmp_path, 10 * 2**16)
    for name in "abcdefgh":
        (tmp_path / name).touch()
    folder.make_room(2 * 2**16, lambda session: session == "visitor")
    with pytest.raises(ValueError, match="no room for more images now"):
        folder.make_room(2 * 2**16 + 1, lambda session: session == "visitor")
    assert len(list(tmp_path.iterdir())) == 8


def test_uploads_that_broke_off_go_and_old_files_go_where_there_is_no_room_unless_a_page_shows_them(sent, tmp_path):
    folder = PageFolder(tmp_path / "page", 3 * 2**16)
    cut, writing, kept = (folder.path / name for name in ("tmpcut", "tmpwriting", "b" * 64))
    kept.mkdir()
    for file, age in ((cut, 61), (writing, 31), (sent, 601), (kept / "x.png", 601)):
        file.write_bytes(b"x")
        os.utime(file, (time.time() - age,) * 2)
    folder.hold("visitor", kept / "x.png")
    folder.hold("gone", sent)
    folder.make_room(0, lambda session: session == "visitor")
    assert sent.exists() and writing.exists() and not cut.exists()
    folder.make_room(2**16, lambda session: session == "visitor")
    assert not sent.parent.exists() and (kept / "x.png").exists()
    result = folder.new_result("visitor", 2**16, lambda session: True)
    (result / "a.png").touch()
    with pytest.raises(ValueError, match="no room"):
        folder.new_result("visitor", 2**18, lambda session: True)
    assert folder.new_result("visitor", 0, lambda session: True) != result and not result.exists()
    folder.leave("visitor", results=True)
    assert list(folder.path.iterdir()) == [writing]


def test_an_upload_stays_as_long_as_somebody_has_it_or_sends_it_again(sent, tmp_path):
    folder = PageFolder(tmp_path / "page", 10**9)
    for session in ("one", "two"):
        folder.hold(session, sent)
    folder.leave("one", results=False)
    assert sent.exists()
    os.utime(sent, ns=(1, 1))  # somebody else has sent the same photo
    folder.leave("two", results=False)
    assert sent.exists()
    folder.hold("three", sent)
    folder.leave("three", results=False)
    assert not sent.parent.exists()


def test_folders_of_killed_servers_go_at_the_next_start_and_others_stay(tmp_path, monkeypatch):
    with page_folder(tmp_path, 1) as living:
        assert living.path.stat().st_mode & 0o777 == 0o700
        (living.path / "x").touch()
        dead, foreign, linked = (tmp_path / f"dit4sr_pl-page-{name}" for name in ("dead", "foreign", "linked"))
        outside = tmp_path / "outside"
        for folder in (dead, outside):
            folder.mkdir()
            (folder / "x").touch()
        linked.symlink_to(outside)
        monkeypatch.setattr("dit4sr_pl.page.folder.time.time", lambda: dead.stat().st_ctime + 3)
        with page_folder(tmp_path, 1) as second:
            assert not dead.exists() and (living.path / "x").exists() and (outside / "x").exists()
        foreign.mkdir()
        if os.getuid() == 0:
            os.chown(foreign, 65534, 65534)
            with page_folder(tmp_path, 1):
                assert foreign.exists()
        assert not second.path.exists()
    assert not living.path.exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGKILL"])
def test_the_folder_is_gone_with_its_process_or_can_be_removed_after_a_kill(name, tmp_path):
    script = "import signal, sys, time; from pathlib import Path\n"
    script += "from dit4sr_pl.page.folder import page_folder; from dit4sr_pl.common.processes import signals_exit\n"
    script += "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # `nohup` has the tests ignore it
    script += "with signals_exit(signal.SIGTERM, signal.SIGHUP), page_folder(Path(sys.argv[1]), 1) as folder:\n"
    script += "    (folder.path / 'x').touch(); print(folder.path, flush=True); time.sleep(60)\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        folder, number = process.stdout.readline().strip(), getattr(signal, name)
        process.send_signal(number)
        assert process.wait(20) == (-9 if name == "SIGKILL" else 128 + number)
    assert os.path.exists(folder) == (name == "SIGKILL")
    if name == "SIGKILL":
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it
        os.close(descriptor)
        shutil.rmtree(folder)


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_exit(signal.SIGHUP, signal.SIGTERM):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            with pytest.raises(SystemExit, match="143"):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)
