"""Damaged checkpoints are told apart from unreadable ones, wherever they are read."""

import errno
import shutil
import zipfile

import pytest
import torch

from dit4sr_pl.model import load_part
from dit4sr_pl.model.training_state import is_whole, read_checkpoint
from dit4sr_pl.training.run_folder import newest_checkpoint

CONFIG = {"network": "sd3_controlnet", "num_layers": 1}


@pytest.fixture
def path(tmp_path):
    state = {"controlnet.weight": torch.arange(999.0)}
    base = {"name": "toy", "fingerprint": ""}
    torch.save({"global_step": 3, "state_dict": state, "settings": CONFIG, "base": base}, tmp_path / "0000003.ckpt")
    return tmp_path / "0000003.ckpt"


def test_a_checkpoint_gives_its_weights(path):
    assert is_whole(path) and read_checkpoint(path)["global_step"] == 3
    part = load_part(path)
    assert part.network_config == CONFIG and torch.equal(part.state["weight"], torch.arange(999.0))


def test_a_checkpoint_that_was_set_aside_is_read_as_one(path):
    aside = path.rename(path.with_name("0000003.ckpt.aside"))
    assert torch.equal(load_part(aside).state["weight"], torch.arange(999.0))


def test_a_changed_byte_in_a_weight_is_damage(path):
    data = bytearray(path.read_bytes())
    at = data.find(torch.arange(999.0).numpy().tobytes()) + 400
    data[at] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["global_step"] == 3  # PyTorch itself does not notice
    assert not is_whole(path)
    with pytest.raises(ValueError, match=r"0000003.ckpt: truncated or not a checkpoint of ours \(the checksum of"):
        load_part(path)


@pytest.mark.slow
def test_a_flip_of_any_bit_of_the_archives_directory_is_damage_or_changes_nothing(path, tmp_path):
    data, whole = path.read_bytes(), read_checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    damaged, flipped = 0, tmp_path / "flipped.ckpt"
    for at in range(start, len(data)):
        for bit in (1, 128):
            flipped.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
            try:
                state = read_checkpoint(flipped)["state_dict"]
                assert torch.equal(state["controlnet.weight"], whole["state_dict"]["controlnet.weight"])
            except ValueError as error:
                assert str(error).startswith(f"{flipped}: ") and "\n" not in str(error)
                damaged += 1
    assert damaged > (len(data) - start) / 2


@pytest.mark.parametrize("contents", [[1, 2], {"weights": 1}, {"global_step": "x"}, torch.zeros(3)])
def test_files_of_pytorch_that_are_no_checkpoints_are_named(path, contents):
    torch.save(contents, path)
    with pytest.raises(ValueError, match="0000003.ckpt: truncated or not a checkpoint of ours"):
        load_part(path)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
def test_what_cannot_be_read_is_not_called_damaged(path, number, monkeypatch):
    def refuse(*_):
        raise OSError(number, "not now")

    monkeypatch.setattr(zipfile.ZipFile, "testzip", refuse)
    with pytest.raises(OSError, match="not now"):
        is_whole(path)


def test_another_users_checkpoints_stop_a_resume_and_are_not_called_damaged(path, somebody_else):
    checkpoints = somebody_else.folder / "checkpoints"
    checkpoints.mkdir()
    for step in (1, 2):
        shutil.copy(path, checkpoints / f"000000{step}.ckpt")
        (checkpoints / f"000000{step}.ckpt").chmod(0o600)
    with somebody_else(), pytest.raises(PermissionError, match="0000002.ckpt"):
        newest_checkpoint(somebody_else.folder, 9)
    assert newest_checkpoint(somebody_else.folder, 9).stem == "0000002"
