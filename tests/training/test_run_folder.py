"""A run's folder: which code ran, who writes to it, and which runs it may hold."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.files import folder_lock
from dit4sr_pl.training.run_folder import check_same_run
from testing.commands import run as command


def test_outside_of_a_checkout_there_is_no_git(monkeypatch, tmp_path):
    from dit4sr_pl.training import provenance

    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    provenance.record_code(tmp_path)
    assert OmegaConf.load(tmp_path / "code.yaml").git == "no git"


@pytest.mark.slow
def test_a_finished_run_says_so_without_pytorch(tmp_path):
    (tmp_path / "finished.yaml").write_text("steps: 1000\n")
    code = "import sys, runpy; sys.argv = ['x', 'output=.']\n" + (
        "runpy.run_module('dit4sr_pl.train', run_name='__main__')\n"
        "assert 'torch' not in sys.modules, 'PyTorch was imported for nothing'"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and ".: finished at step 1000" in result.stderr, result.stderr


def hold(folder: Path, ready) -> None:
    with folder_lock(folder):
        if os.fork() == 0:  # DataLoader's workers outlive a killed process too
            time.sleep(60)
            os._exit(0)
        ready.set()
        time.sleep(60)


@pytest.mark.slow
def test_a_folder_belongs_to_one_process_until_that_ends(tmp_path):
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    result = command("dit4sr_pl.train", f"output={tmp_path}", cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert f"{tmp_path}: process {process.pid} on " in result.stderr and "writes here; wait for it" in result.stderr
    process.kill()
    process.join()
    with folder_lock(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


@pytest.fixture(scope="module")
def theirs() -> DictConfig:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose("train", ["output=x"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides, named",
    [
        (["optimizer.lr=1"], "settings: optimizer.lr=1 (the run has 5e-05);"),
        (["+ablation=no_lr_residual"], "model.network.variant.lr_residual=False (the run has True)"),
        (["callbacks.ema.decay=0.5"], "callbacks.ema.decay"),
        (["callbacks=default"], "callbacks.ema"),
        (["seed=1"], "settings: seed=1 (the run has 0);"),
        (["trainer.precision=bf16-mixed"], "trainer.precision"),
        (["data.batch_size=8"], "images per step=8 (the run has 16)"),
        (["data.batch_size=8", "trainer.devices=2"], None),
        (["data.batch_size=8", "trainer.accumulate_grad_batches=2"], None),
        (["trainer.max_steps=2000", "trainer.log_every_n_steps=1", "trainer.val_check_interval=9"], None),
        (["data.num_workers=8", "data.validation_folders=[]", "sampler.steps=1", "metrics.psnr=null"], None),
        (["~callbacks.progress", "callbacks.checkpoint.every_n_train_steps=1", "model.compile=true"], None),
    ],
)
def test_a_folder_holds_runs_of_one_kind(tmp_path, theirs, overrides, named):
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        ours = compose("train", ["output=x", *overrides])
    OmegaConf.save(theirs, tmp_path / "config.yaml", resolve=True)
    check_same_run(ours, tmp_path)  # without checkpoints the folder holds no run
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "0000001.ckpt").touch()
    if named is None:
        return check_same_run(ours, tmp_path)
    with pytest.raises(ValueError, match="holds a run with other settings.*overwrite=true") as refused:
        check_same_run(ours, tmp_path)
    assert named in str(refused.value)
