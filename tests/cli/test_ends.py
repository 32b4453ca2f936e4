"""How commands end: exit codes as shells and schedulers expect them, and what `--cfg` shows."""

import os
import subprocess
import sys

import pytest

from dit4sr_pl import train
from dit4sr_pl.cli.command import command, one_line, with_whole_config
from testing.commands import call


def test_ctrl_c_is_a_line_and_130(monkeypatch, capsys):
    def interrupt(cfg):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["plan"])
    with pytest.raises(SystemExit) as stopped:
        command("plan")(interrupt)()
    assert stopped.value.code == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_into_a_pipe_that_is_closed_is_quiet_and_141(unbuffered, tmp_path):
    """As `| head -0` closes it."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "dit4sr_pl.restore", "--help"]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(command, cwd=tmp_path, env=environment, stdout=writes, stderr=subprocess.PIPE, timeout=60)
    os.close(writes)
    assert (result.returncode, result.stderr) == (141, b"")


def test_another_broken_pipe_is_an_error(monkeypatch):
    def write(cfg):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "argv", ["plan"])
    with pytest.raises(SystemExit, match="error: .*Broken pipe"):
        command("plan")(write)()


def test_a_process_that_lightning_started_ends_with_the_first_one(monkeypatch):
    def end(signum):
        raise RuntimeError(signum)

    monkeypatch.setattr(train, "end_with_parent", end)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(RuntimeError, match="9"):
        train.train(None)


@pytest.mark.parametrize("given", ["job", "all", "hydra"])
def test_the_config_that_is_shown_has_the_folder_that_the_run_will_take(given, tmp_path, monkeypatch, capsys):
    assert call("dit4sr_pl.train", "+ablation=full", "seed=3", "--cfg", given, "--resolve", cwd=tmp_path) is None
    folder = f"{'  dir' if given == 'hydra' else 'output'}: {tmp_path}/outputs/default/full/seed3\n"
    assert folder in capsys.readouterr().out


def test_a_section_is_shown_of_the_whole_config_only_if_it_is_resolved():
    assert with_whole_config(["--cfg=hydra"]) == ["--cfg=hydra"]
    assert with_whole_config(["seed=1", "-c", "hydra", "--resolve"]) == [
        *("seed=1", "--cfg", "all", "--package", "hydra", "--resolve")
    ]
    assert with_whole_config(["--cfg=hydra", "--resolve", "-p", "hydra.run"]) == [
        *("--cfg", "all", "--resolve", "-p", "hydra.run")
    ]


def test_an_error_of_the_system_names_its_file_and_what_to_do():
    denied = PermissionError(13, "Permission denied", "/x/a.png")
    assert one_line(denied) == "/x/a.png: Permission denied; give this user access, or choose another path"
    assert one_line(OSError(28, "No space left on device")).startswith("No space left on device; free some space")
    assert one_line(FileNotFoundError("a: no such file; give b")) == "a: no such file; give b"
