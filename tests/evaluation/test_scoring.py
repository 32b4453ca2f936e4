"""Tasks of one evaluation that work at the same time."""

import json
import os
import threading
from types import SimpleNamespace

import pytest
import torch

from dit4sr_pl.common.files import exclusive_lock
from dit4sr_pl.evaluation import scoring
from dit4sr_pl.evaluation.scoring import journal, locked, read_pieces, remove_pieces, working
from dit4sr_pl.images.files import write_image


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


def test_an_image_is_written_while_the_next_is_restored_and_a_failed_write_ends_the_evaluation(tmp_path, monkeypatch):
    second, items = threading.Event(), []
    for name in "abc":
        items.append(SimpleNamespace(name=name, sr=tmp_path / f"{name}.png", caption="", read_lr=lambda: None))

    def method(lr_images):
        for number, image in enumerate(lr_images):
            if number == 1:
                second.set()
            yield image.name, torch.rand(3, 4, 4)

    def write(path, image):
        assert second.wait(20)
        if path.stem == "c":
            raise OSError("disk full")
        write_image(path, image)

    monkeypatch.setattr(scoring, "write_image", write)
    with pytest.raises(OSError, match="disk full"):
        scoring.restore(items, method, iter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]
