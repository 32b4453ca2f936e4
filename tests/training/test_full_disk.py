"""Training on a file system that really is full for a while, and on one without links."""

import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch.utils.tensorboard import SummaryWriter

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.model import load_part
from dit4sr_pl.train import train
from dit4sr_pl.training import event_log
from dit4sr_pl.training.callbacks import Checkpoints
from dit4sr_pl.training.callbacks.losses import append_row, keep_rows
from dit4sr_pl.training.event_log import TolerantWriter
from dit4sr_pl.training.run_folder import by_step, checkpoints_in, finished_steps
from testing.toy_runs import losses, toy

OPTIONS = ["metrics=[psnr]", "trainer.max_steps=6", "trainer.val_check_interval=3", "callbacks.checkpoint.keep_last=9"]
OPTIONS += ["callbacks.checkpoint.every_n_train_steps=1", "+callbacks.losses.folder=${output}"]
OPTIONS += ["+callbacks.losses._target_=dit4sr_pl.training.callbacks.Losses"]


def start(photos: Path, folder: Path, *overrides: str) -> dict[str, float]:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return train(compose("train", [*toy(photos, folder), *OPTIONS, *overrides]))


@pytest.fixture
def disk(tmp_path):
    """A file system of 40 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system takes root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of tensorboard's own thread
def test_a_disk_that_is_full_for_three_steps_costs_their_records_and_nothing_else(
    photos, tmp_path, disk, caplog, monkeypatch
):
    monkeypatch.setattr(event_log, "PAUSE", 0)  # it tries again at every step
    start(photos, tmp_path / "whole")
    fill = f"{{_target_: testing.events.FillDisk, folder: {disk}, full_at: 2, free_at: 5}}"
    start(photos, disk / "run", f"+callbacks.monitor={fill}")
    assert finished_steps(disk / "run", 6) == 6
    assert [int(path.stem) for path in checkpoints_in(disk / "run")] == [6, 2, 1]
    assert "0000003.ckpt: not saved (No space left on device)" in caplog.text
    assert "images/0.png: not written (No space left on device)" in caplog.text
    ours, theirs = (load_part(folder / "lr_stream.safetensors").state for folder in (disk / "run", tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(disk / "run")[-1] == losses(tmp_path / "whole")[-1]
    assert not list((disk / "run").rglob("*.partial"))


def test_a_row_of_losses_that_does_not_fit_leaves_no_part_of_it(tmp_path):
    path, limits = tmp_path / "losses.csv", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_text("batch,loss\n1,0.5\n2,0.2\n3,0.")
    keep_rows(path, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 4, limits[1]))
    try:
        with pytest.raises(OSError, match="No space left on device"):
            append_row(path, b"3,0.25\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    append_row(path, b"4,0.75\n")
    assert path.read_text() == "batch,loss\n1,0.5\n2,0.2\n4,0.75\n"
    keep_rows(path, 1)
    assert path.read_text() == "batch,loss\n1,0.5\n"


def test_a_writer_of_events_goes_on_after_an_error(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(event_log, "PAUSE", 0)
    writer, get = TolerantWriter(tmp_path), SummaryWriter._get_file_writer

    def refuse(_):
        raise OSError(28, "No space left on device")

    writer.add_scalar("a", 1, 1)
    monkeypatch.setattr(SummaryWriter, "_get_file_writer", refuse)
    writer.add_scalar("a", 1, 2)
    assert "events are not logged for 0 s (No space left on device)" in caplog.text
    monkeypatch.setattr(SummaryWriter, "_get_file_writer", get)
    writer.add_scalar("a", 1, 3)
    writer.close()
    assert len(list(tmp_path.glob("events*"))) == 2


def test_a_file_system_without_links_is_told_of_once(tmp_path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    callback = Checkpoints(str(tmp_path), None, None, 3)
    callback.link("0000001.ckpt")
    callback.link("0000002.ckpt")
    assert caplog.text.count("last.ckpt: not linked to 0000001.ckpt (Operation not permitted)") == 1
    assert "0000002" not in caplog.text and os.listdir(tmp_path) == []


def test_checkpoints_are_in_the_order_of_their_steps_and_not_of_their_names(tmp_path):
    for step in (9999998, 9999999, 10000000):
        (tmp_path / f"{step:07d}.ckpt").touch()
    assert [path.stem for path in by_step(tmp_path)] == ["10000000", "9999999", "9999998"]
