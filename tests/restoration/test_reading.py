"""Reading ahead in another process: what is read when, what of it is in memory, and which picture a note belongs to."""

import multiprocessing
import os
import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from dit4sr_pl.images.picture_files import read_picture
from dit4sr_pl.restoration import reading as module
from dit4sr_pl.restoration.reading import reading
from dit4sr_pl.restoration.worklist import batches, make_worklist
from testing.small_photos import write_photos
from testing.stand_ins import Bicubic, command


@pytest.fixture
def folder(tmp_path):
    return write_photos(tmp_path / "in")


def worklist(folder, batch_size=1):
    return list(batches(make_worklist(folder, folder.parent / "out").entries, batch_size))


class Log:
    """Lines that this process and its children append to a file."""

    def __init__(self, path):
        self.path = path
        self.path.touch()

    def add(self, line):
        with self.path.open("a") as file:
            file.write(f"{line}\n")

    def lines(self):
        return self.path.read_text().splitlines()

    def wait(self, line):
        deadline = time.monotonic() + 20
        while line not in self.lines():
            assert time.monotonic() < deadline, (line, self.lines())
            time.sleep(0.002)


def test_the_next_picture_is_read_before_one_is_written_and_no_further_one(folder, tmp_path, monkeypatch):
    log = Log(tmp_path / "log")
    order = [batch[0].source.stem for batch in worklist(folder)]

    def read(path, first_frame):
        picture = read_picture(path, first_frame)
        log.add(f"read {path.stem}")
        return picture

    class Watched(Bicubic):
        def __call__(self, lr, size, captions, names, seed, on_step):
            number = order.index(names[0])
            if number + 1 < len(order):
                log.wait(f"read {order[number + 1]}")
            assert len([line for line in log.lines() if line.startswith("read")]) <= number + 2
            assert f"wrote {names[0]}" not in log.lines()
            return super().__call__(lr, size, captions, names, seed, on_step)

    from dit4sr_pl.restoration.pictures import write_picture

    def write(path, *arguments):
        written = write_picture(path, *arguments)
        log.add(f"wrote {path.stem}")
        return written

    monkeypatch.setattr(module, "read_picture", read)
    monkeypatch.setattr("dit4sr_pl.restoration.pictures.write_picture", write)
    assert command(monkeypatch, Watched(), f"input={folder}", f"output={tmp_path / 'out'}") is None
    assert [line for line in log.lines() if line.startswith("read")] == [f"read {name}" for name in order]
    assert len(log.lines()) == 10


def test_the_first_batch_is_read_before_there_is_a_network(folder, tmp_path, monkeypatch):
    log = Log(tmp_path / "log")
    monkeypatch.setattr(module, "read_picture", lambda path, _: log.add(f"read {path.stem}") or read_picture(path))
    with reading(worklist(folder)):
        log.wait("read 0")
    assert log.lines() == ["read 0"]
    assert not multiprocessing.active_children()


def test_a_picture_keeps_its_pixels_and_its_notes_on_the_way(tmp_path):
    """Another thread warns all the time; its warnings are neither hidden nor taken for the pictures' own."""
    (tmp_path / "in").mkdir()
    levels = np.random.default_rng(0).integers(0, 65536, (5, 7), dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "in" / "a.png")
    Image.fromarray(levels.astype(np.uint8)).convert("RGBA").save(tmp_path / "in" / "b.png", icc_profile=b"none")
    Image.fromarray(levels.astype(np.uint8)).save(tmp_path / "in" / "c.png")
    (tmp_path / "in" / "d.png").write_bytes((tmp_path / "in" / "c.png").read_bytes()[:60])
    stop, in_batches = threading.Event(), worklist(tmp_path / "in")

    def warn():
        count = 0
        while not stop.is_set():
            warnings.warn("another's", UserWarning, stacklevel=1)
            count += 1
        return count

    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(1) as thread:
        warnings.simplefilter("always")
        count = thread.submit(warn)
        try:
            with reading(in_batches) as read:
                found = [pair for batch in read for pair in batch]
        finally:
            stop.set()
        assert 0 < count.result() == len(caught)
    *found, (damaged, message) = found
    assert damaged.source.stem == "d" and message.startswith(f"{damaged.source}: not a readable image")
    assert [entry.source.stem for entry, _ in found] == list("abc")
    for entry, picture in found:
        expected = read_picture(entry.source)
        assert torch.equal(picture.color, expected.color) and picture.bits == expected.bits
        assert (picture.alpha is None) == (expected.alpha is None) and picture.notes == expected.notes
        assert picture.alpha is None or torch.equal(picture.alpha, expected.alpha)
        assert bool(picture.notes) == (entry.source.stem == "b")


@pytest.mark.slow
def test_a_file_that_kills_the_process_which_reads_it_is_named_and_the_others_are_restored(
    folder, tmp_path, monkeypatch, capsys
):
    def read(path, first_frame):
        if path.stem == "2":
            os.kill(os.getpid(), signal.SIGKILL)
        return read_picture(path, first_frame)

    monkeypatch.setattr(module, "read_picture", read)
    message = command(monkeypatch, Bicubic(), f"input={folder}", f"output={tmp_path / 'out'}", "batch_size=2")
    assert message.startswith(f"error: not restored: {folder / '2.png'}: the process that read it was killed")
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == list("0134")
    assert not multiprocessing.active_children()
