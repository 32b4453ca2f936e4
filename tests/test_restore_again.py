"""What counts as done when `restore` is given again, and who may write into its folder."""

import os
import subprocess
import sys

import pytest

from dit4sr_pl.common.files import folder_lock
from dit4sr_pl.restoration import made_with
from testing.small_photos import write_photo
from testing.stand_ins import Bicubic, command, run_restore


@pytest.mark.slow
def test_what_is_done_stays_without_a_model_until_overwrite(folder, tmp_path, monkeypatch, capsys):
    arguments = [f"input={folder}", f"output={tmp_path / 'out'}"]
    restorer = Bicubic()
    command(monkeypatch, restorer, *arguments)
    assert command(monkeypatch, restorer, *arguments) is None
    assert restorer.loads == 0 and "nothing to do: 5 of 5 images are in" in capsys.readouterr().out
    (tmp_path / "out/0.png").unlink()
    (tmp_path / "out/3.png").write_bytes(b"mine")
    assert "out/3.png: exists and is no PNG; move it, or give" in command(monkeypatch, restorer, *arguments)
    assert "1 of 5 images restored" in (out := capsys.readouterr().out) and "3 were there" in out
    assert (tmp_path / "out/3.png").read_bytes() == b"mine"
    assert command(monkeypatch, restorer, *arguments, "overwrite=true") is None
    assert (tmp_path / "out/3.png").read_bytes() != b"mine"


@pytest.mark.slow
def test_a_result_of_other_settings_is_not_taken_for_done(photo, tmp_path, monkeypatch):
    arguments, result = [f"input={photo}", f"output={tmp_path / 'out'}"], tmp_path / "out/photo.png"
    assert command(monkeypatch, Bicubic(), *arguments) is None
    before = result.read_bytes()
    for other, named in (
        ("scale=2", "scale=4 (now 2)"),
        ("seed=5", "seed=0 (now 5)"),
        ("sampler.steps=3", "sampler.steps="),
    ):
        message = command(monkeypatch, Bicubic(), *arguments, other)
        assert "restored before with other settings: " in message and f"photo.png with {named}" in message
    assert result.read_bytes() == before
    assert command(monkeypatch, Bicubic(), *arguments, "sampler.tile_memory=9", "batch_size=2") is None  # no effect
    assert command(monkeypatch, Bicubic(), *arguments, "scale=2", "overwrite=true") is None
    assert command(monkeypatch, Bicubic(), *arguments, "scale=2") is None and result.read_bytes() != before
    os.removexattr(result, made_with.ATTRIBUTE)
    assert command(monkeypatch, Bicubic(), *arguments) is None  # as results of before 0.2


def test_a_result_of_another_caption_is_not_taken_for_done(photo, tmp_path, monkeypatch):
    arguments, text = [f"input={photo}", f"output={tmp_path / 'out'}"], photo.with_suffix(".txt")
    assert command(monkeypatch, Bicubic(), *arguments) is None
    text.write_text("a dog")
    message = command(monkeypatch, Bicubic(), *arguments)
    assert "photo.png with caption= (now a dog); give another output, delete them" in message
    (tmp_path / "out/photo.png").unlink()
    assert command(monkeypatch, Bicubic(), *arguments) is None
    assert command(monkeypatch, Bicubic(), *arguments) is None  # nothing to do
    text.write_text("a cat " * 20)
    assert "with caption=a dog (now " in command(monkeypatch, Bicubic(), *arguments)
    made_with.check_same_settings(tmp_path, {tmp_path / "out/photo.png": None}, {"scale": 4})  # a captioner will say


def test_a_file_system_that_keeps_no_attributes_is_told_of_once(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", refuse)
    recorder = made_with.Recorder({"scale": 4})
    for name in ("a.png", "b.png"):
        recorder.add(tmp_path / name, caption="")
    assert len(caplog.messages) == 1 and "a.png: its settings are not recorded" in caplog.text


@pytest.mark.parametrize("left", [0, 20, -1])
def test_an_empty_or_cut_off_result_is_not_done(photo, tmp_path, monkeypatch, left):
    arguments = [f"input={photo}", f"output={tmp_path / 'out'}"]
    assert command(monkeypatch, Bicubic(), *arguments) is None
    whole = (tmp_path / "out/photo.png").read_bytes()
    (tmp_path / "out/photo.png").write_bytes(whole[:left])
    assert command(monkeypatch, Bicubic(), *arguments) is None
    assert (tmp_path / "out/photo.png").read_bytes() == whole and os.listdir(tmp_path / "out") == ["photo.png"]


def test_one_task_at_a_time_restores_into_a_folder_and_shards_do_side_by_side(folder, tmp_path, monkeypatch, capsys):
    arguments = [f"input={folder}", f"output={tmp_path / 'out'}"]
    with folder_lock(tmp_path / "out", (1, 2)):
        for shard in ("1/1", "1/2"):
            message = command(monkeypatch, Bicubic(), *arguments, f"shard={shard}")
            assert f"{tmp_path / 'out'}: " in message and "writes here; wait for it" in message
        assert command(monkeypatch, Bicubic(), *arguments, "shard=2/2") is None
    assert sorted(os.listdir(tmp_path / "out")) == ["1.png", "3.png"]
    assert command(monkeypatch, Bicubic(), *arguments, "shard=1/2") is None
    assert sorted(os.listdir(tmp_path / "out")) == [f"{i}.png" for i in range(5)]
    assert "3 of 3 images restored" in capsys.readouterr().out
    assert "shard=3/2: must be i/n" in run_restore(monkeypatch, *arguments, "shard=3/2")


@pytest.mark.slow
def test_nothing_to_do_reads_no_pytorch(folder, tmp_path):
    for i in range(5):
        write_photo(tmp_path / f"out/{i}.png")
    code = (
        "import sys, runpy; sys.argv = ['restore', 'input=in', 'output=out']\n"
        "runpy.run_module('dit4sr_pl.restore', run_name='__main__')\n"
        "assert 'torch' not in sys.modules, 'PyTorch was imported'"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and result.stdout.startswith("nothing to do"), result.stderr
