"""Tasks of one evaluation that work at the same time."""

import json
import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from dit4sr_pl.common.files import exclusive_lock
from dit4sr_pl.common.read_ahead import in_batches
from dit4sr_pl.evaluation import scoring
from dit4sr_pl.evaluation.benchmark_sets import Item
from dit4sr_pl.evaluation.scoring import journal, locked, read_pieces, remove_pieces, working
from dit4sr_pl.images.picture_files import write_picture


def test_a_task_that_ends_leaves_the_pieces_of_those_that_work_or_measured_more(tmp_path):
    with working(tmp_path, (1, 3)) as own, working(tmp_path, (2, 3)) as held, journal(own) as write:
        write({"image": "é", "psnr": 1.0})
        held.write_text(json.dumps({"image": "b", "psnr": 2.0}) + "\n")
        further = held.with_name("3-of-3.jsonl")
        further.write_text(json.dumps({"image": "c", "psnr": 3.0, "ssim": 1.0}) + "\n")
        remove_pieces(tmp_path, own, {"psnr"})
        assert sorted(os.listdir(tmp_path / "parts")) == ["2-of-3.jsonl", "3-of-3.jsonl"]
        assert read_pieces(tmp_path)["c"] == {"psnr": 3.0, "ssim": 1.0}
    remove_pieces(tmp_path, own, {"psnr", "ssim"})
    assert os.listdir(tmp_path) == []


def test_the_lock_of_scores_outlasts_a_replaced_settings_file(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    with locked(tmp_path):
        (tmp_path / "new").write_text("{}")
        os.replace(tmp_path / "new", tmp_path / "settings.json")
        with pytest.raises(ValueError, match="writes here"), exclusive_lock(tmp_path / ".lock-of-scores"):
            pass


class Recorded:
    """Items, a method and a writer that record what happens to the images in `events`."""

    def __init__(self, folder, names, monkeypatch):
        self.events, self.folder, self.lr = [], folder, torch.zeros(1, 3, 2, 2)
        self.released = threading.Event()
        self.released.set()
        self.items = [self.item(name) for name in names]
        monkeypatch.setattr(scoring, "write_picture", self.write)

    def item(self, name):
        read = lambda: self.events.append(f"read {name}") or self.lr  # noqa: E731
        return SimpleNamespace(name=name, sr=self.folder / f"{name}.png", caption="", crop=8, read_lr=read)

    def method(self, lr_images, most=1):
        for batch in in_batches(lr_images, most, lambda image: image.lr.shape):
            self.events.append("restore " + "".join(image.name for image in batch))
            yield from ((image.name, torch.rand(3, 8, 8)) for image in batch)

    def write(self, path, picture, level):
        assert self.released.wait(20)
        write_picture(path, picture, level)
        self.events.append(f"wrote {path.stem}")

    def wait(self, *events):
        deadline = time.monotonic() + 20
        while not set(events) <= set(self.events):
            assert time.monotonic() < deadline, (events, self.events)
            time.sleep(0.001)


def test_an_image_is_written_and_the_next_is_read_while_one_is_restored(tmp_path, monkeypatch):
    record = Recorded(tmp_path, "abcd", monkeypatch)

    def method(lr_images):
        for name, sr in record.method(lr_images):
            before, following = "abcd"[: "abcd".index(name)], "abcd"["abcd".index(name) + 1 :]
            record.wait(*(f"wrote {other}" for other in before), *(f"read {other}" for other in following[:1]))
            assert not {f"read {other}" for other in following[1:]} & set(record.events)  # one ahead at most
            yield name, sr

    scoring.restore(record.items, method, iter)
    assert sorted(path.stem for path in tmp_path.iterdir()) == list("abcd")


def test_a_batch_is_read_while_one_is_restored_and_a_batch_of_results_waits_at_most(tmp_path, monkeypatch):
    record = Recorded(tmp_path, "abcdefg", monkeypatch)
    record.released.clear()

    def method(lr_images):
        for number, (name, sr) in enumerate(record.method(lr_images, 3)):
            if number in (0, 3):  # the first of a batch, with another to come
                record.wait(*(f"read {later}" for later in "abcdefg"[number + 3 : number + 6]))
            if number == 3:
                record.released.set()  # until now nothing was written
            yield name, sr
            assert {f"wrote {before}" for before in "abcdefg"[: max(number - 2, 0)]} <= set(record.events)

    scoring.restore(record.items, method, iter, batch_size=3)
    restored = [event for event in record.events if event.startswith("restore")]
    assert restored == ["restore abc", "restore def", "restore g"]
    assert len(list(tmp_path.iterdir())) == 7


def test_a_failed_write_ends_the_evaluation_and_what_was_written_stays(tmp_path, monkeypatch):
    record = Recorded(tmp_path, "abc", monkeypatch)

    def write(path, *arguments):
        if path.stem == "c":
            raise OSError("disk full")
        write_picture(path, *arguments)

    monkeypatch.setattr(scoring, "write_picture", write)
    with pytest.raises(OSError, match="disk full"):
        scoring.restore(record.items, record.method, iter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


class Score:
    """A metric whose memory is short for more than `most` images; each score is the image's mean."""

    device, score = torch.device("cpu"), True

    def __init__(self, most):
        self.most, self.asked = most, []

    def each(self, sr, hr):
        self.asked.append(len(sr))
        if len(sr) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (sr if hr is None else hr).mean((1, 2, 3))


class Held(Item):
    """An item whose restored image is a tensor in the place of a file."""

    __hash__ = object.__hash__

    def read_sr(self):
        return self.sr


def test_images_of_one_size_are_scored_together_and_one_by_one_where_memory_is_short(tmp_path):
    images = [torch.full((1, 3, side, side), float(number)) for number, side in enumerate((4, 4, 4, 5, 4))]
    items = [Held(str(number), image, None) for number, image in enumerate(images)]
    for most, asked in ((3, [2, 1, 1, 1]), (1, [2, 1, 1, 1, 1, 1])):
        metric, folder = Score(most), tmp_path / str(most)
        with working(folder, (1, 1)) as piece:
            scoring.score(items, {"mean": metric}, folder, piece, iter, batch_size=2)
            assert read_pieces(folder) == {str(number): {"mean": float(number)} for number in range(5)}
        assert metric.asked == asked
