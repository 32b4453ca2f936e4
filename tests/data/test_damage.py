"""Damaged photos and captions among the training data."""

import errno
import itertools
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dit4sr_pl.cli.command import one_line
from dit4sr_pl.data import datasets
from dit4sr_pl.data.datasets import Draw, TrainingCrops, ValidationImages
from dit4sr_pl.data.module import PositionSampler
from dit4sr_pl.images.files import UnreadableNow, write_image
from dit4sr_pl.preparation.build_manifest import build_manifest


@pytest.fixture
def damaged(tmp_path) -> Path:
    """Four photos, the second of which is rubbish."""
    for i in range(4):
        write_image(tmp_path / f"{i:02}.png", torch.zeros(3, 32, 32))
    (tmp_path / "01.png").write_bytes(b"rubbish")
    return tmp_path


def test_unreadable_file_is_replaced_by_the_next_and_reported_once(damaged, caplog):
    dataset = TrainingCrops(damaged, 32, 0, min_gradient=0)
    with caplog.at_level(logging.WARNING):
        names = [dataset[Draw(index, epoch, 0)]["name"] for epoch in range(2) for index in range(4)]
    assert names == ["00", "02", "02", "03"] * 2
    (message,) = caplog.messages
    assert "01.png: not a readable image (unknown format); skipped" in message


def test_two_workers_report_an_unreadable_file_once_on_the_terminal(damaged, capfd):
    root = logging.getLogger()
    terminal = logging.StreamHandler()  # pytest's own handlers would swallow the workers' lines
    root.addHandler(terminal)
    try:
        dataset = TrainingCrops(damaged, 32, 0, min_gradient=0)
        loader = DataLoader(dataset, batch_sampler=PositionSampler(4, 1, 0), num_workers=2)
        list(itertools.islice(loader, 24))
    finally:
        root.removeHandler(terminal)
    assert capfd.readouterr().err.count("01.png: not a readable image") == 1


def test_no_readable_file_at_all_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="none of the 1 images is readable"):
        TrainingCrops(tmp_path, 32, 0)


def test_caption_that_is_no_text_is_named(tmp_path):
    write_image(tmp_path / "a.png", torch.zeros(3, 32, 32))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="a.txt: the caption is not UTF-8"):
        TrainingCrops(tmp_path, 32, 0, min_gradient=0, empty_prompt_probability=0)[Draw(0, 0, 0)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_photo_that_is_gone_ends_the_run_in_one_line_that_names_it(tmp_path, monkeypatch, workers):
    """Another photo in its place would be another training; a worker's error has its whole traceback."""
    for name in "ab":
        write_image(tmp_path / f"{name}.png", torch.rand(3, 32, 32))
    crops = TrainingCrops(tmp_path, 32, 0, min_gradient=0)
    monkeypatch.setattr(datasets, "PAUSES", ())
    (tmp_path / "b.png").unlink()
    loader = DataLoader(crops, batch_sampler=PositionSampler(2, 2, 0), num_workers=workers)
    with pytest.raises(ValueError, match="b.png") as failed:
        next(iter(loader))
    assert one_line(failed.value) == f"{tmp_path}/b.png: not a readable image (no such file)"


@pytest.mark.slow
def test_what_cannot_be_read_is_found_before_the_first_step(tmp_path, caplog):
    for name in "abc":
        write_image(tmp_path / f"{name}.png", torch.rand(3, 32, 32))
        (tmp_path / f"{name}.txt").write_text(f"a picture of {name}")
    crops, validation = TrainingCrops(tmp_path, 32, 0, min_gradient=0), ValidationImages(tmp_path, 32, 0)
    before = crops.check()
    (tmp_path / "b.txt").write_bytes("ein schönes Bild".encode("windows-1252"))
    with pytest.raises(ValueError, match="b.txt: the caption is not UTF-8 text; convert it or remove it"):
        crops.check()
    (tmp_path / "b.txt").write_text("another picture")
    now = crops.check()
    assert [what for what in now if now[what] != before[what]] == [f"captions of {tmp_path}"]
    (tmp_path / "c.png").write_bytes((tmp_path / "c.png").read_bytes()[:-40])
    with pytest.raises(ValueError, match="c.png: not a readable image"):
        validation.check()
    (tmp_path / "c.png").write_bytes(b"")
    assert now[f"photos of {tmp_path}"] != crops.check()[f"photos of {tmp_path}"]
    assert "1 photos are empty, and skipped (c.png)" in caplog.text
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 photos cannot be read: a.png \(missing\); bring them back"):
        crops.check()


def test_another_users_photos_are_found_before_the_first_step_and_are_not_damaged(somebody_else, monkeypatch):
    for name in "ab":
        write_image(somebody_else.folder / f"{name}.png", torch.rand(3, 32, 32))
    crops = TrainingCrops(somebody_else.folder, 32, 0, min_gradient=0)
    monkeypatch.setattr(datasets, "PAUSES", ())
    (somebody_else.folder / "b.png").chmod(0o600)
    with somebody_else():
        with pytest.raises(ValueError, match=r"1 of 2 photos cannot be read: b.png \(may not be read\)"):
            crops.check()
        with pytest.raises(UnreadableNow, match=r"b.png: not a readable image \(may not be read\)"):
            crops[Draw(1, 0, 1)]


@pytest.mark.parametrize("failures, read", [(1, True), (2, True), (99, False)])
def test_a_read_that_fails_is_repeated_and_never_puts_another_photo_in_its_place(tmp_path, monkeypatch, failures, read):
    for name in "ab":
        write_image(tmp_path / f"{name}.png", torch.rand(3, 32, 32))
    crops = TrainingCrops(tmp_path, 32, 0, min_gradient=0)
    monkeypatch.setattr(datasets, "PAUSES", (0, 0))
    opened, left = Image.open, [failures]

    def fail(path, **options):
        if Path(path).name == "b.png" and left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return opened(path, **options)

    monkeypatch.setattr(Image, "open", fail)
    if read:
        assert crops[Draw(1, 0, 1)]["name"] == "b"
    else:
        with pytest.raises(ValueError, match="b.png: cannot be read now .Stale file handle"):
            crops[Draw(1, 0, 1)]
        with pytest.raises(ValueError, match="b.png: cannot be read now"):
            build_manifest(tmp_path)
