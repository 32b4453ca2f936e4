"""Tasks of one evaluation that work at the same time."""

import json
import os

import pytest

from dit4sr_pl.common.files import exclusive_lock
from dit4sr_pl.evaluation.scoring import journal, locked, read_pieces, remove_pieces, working


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
