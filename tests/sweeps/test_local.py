"""In a sweep each job equals the same run by itself, and a failed job does not stop the others."""

import gc
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from lightning import LightningModule, Trainer
from omegaconf import OmegaConf

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.train import main, train
from testing.toy_runs import small

LOSSES = ["+callbacks.losses._target_=dit4sr_pl.training.callbacks.Losses", "+callbacks.losses.folder=${output}"]
BAD, STOPPED = 1, 2


def options(photos: Path, stopped: int | None) -> list[str]:
    stopped = "null" if stopped is None else stopped
    given = f"{{_target_: testing.events.Threads, folder: ${{output}}, seed: ${{seed}}, stopped: {stopped}}}"
    return [*small(photos), *LOSSES, "metrics=[psnr]", f"+callbacks.monitor={given}"]


def prepare(folder: Path) -> Path:
    """Returns the folder of a sweep's runs below the working folder; that of seed `BAD` holds a run with other
    settings."""
    full = folder / "outputs" / "default" / "full"
    bad = full / f"seed{BAD}"
    bad.mkdir(parents=True)
    (bad / "finished.yaml").write_text("steps: 2\n")
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        OmegaConf.save(compose("train", ["optimizer.lr=1", f"output={bad}", f"seed={BAD}"]), bad / "config.yaml")
    return full


def sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dit4sr_pl.train", "-m", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("OMP_NUM_THREADS", None)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def alone(photos, tmp_path_factory) -> Callable[[int], str]:
    """Returns a function that gives the losses of a run by itself."""
    folder = tmp_path_factory.mktemp("alone")

    def losses(seed: int) -> str:
        output = folder / str(seed)
        if not output.exists():
            with initialize_config_dir(str(conf_folder()), version_base="1.3"):
                train(compose("train", [*options(photos, None), f"seed={seed}", f"output={output}"]))
        return (output / "losses.csv").read_text()

    return losses


@pytest.mark.slow
def test_one_after_another_each_job_is_what_it_is_alone_and_one_that_fails_keeps_none(
    photos, tmp_path, alone, monkeypatch
):
    full = prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "-m", f"seed=0,{BAD},3", *options(photos, None)])
    with pytest.raises(SystemExit) as end:
        main()
    error = f"error: seed={BAD}: {full}/seed{BAD} holds a run with other settings: "
    assert end.value.code.startswith(error) and "\n" not in end.value.code
    for seed in (0, 3):
        assert (full / f"seed{seed}" / "finished.yaml").exists()
        assert (full / f"seed{seed}" / "losses.csv").read_text() == alone(seed)


@pytest.mark.slow
def test_side_by_side_jobs_share_the_cores_and_one_that_is_stopped_keeps_none(photos, tmp_path, alone):
    full = prepare(tmp_path)
    result = sweep(tmp_path, "hydra/launcher=local", f"seed={BAD},{STOPPED},3", *options(photos, STOPPED))
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and len(errors) == 2 and "srun" not in result.stderr, result.stderr
    assert errors[0].startswith(f"error: seed={BAD}: ")
    assert errors[1] == f"error: seed={STOPPED}: stopped by a signal (exit code 143)"
    assert (full / "seed3" / "losses.csv").read_text() == alone(3)
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert int((full / "seed3" / "threads").read_text()) == share


@pytest.mark.slow
def test_sigterm_ends_a_sweep_in_one_process(photos, tmp_path):
    full = prepare(tmp_path)
    result = sweep(tmp_path, "seed=0,2", *options(photos, 0))
    assert result.returncode == 143 and (full / "seed0" / "checkpoints" / "last.ckpt").exists()
    assert not (full / "seed2").exists()


@pytest.mark.slow
def test_a_run_leaves_nothing_in_its_process(photos, tmp_path):
    def state() -> tuple:
        gc.collect()
        alive = sum(issubclass(type(each), LightningModule | Trainer) for each in gc.get_objects())
        names = ("dit4sr_pl", "py.warnings", "lightning.pytorch", None)
        handlers = [list(logging.getLogger(name).handlers) for name in names]
        signals = [signal.getsignal(signum) for signum in signal.valid_signals()]
        return alive, handlers, signals

    before = state()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        train(compose("train", [*options(photos, None), f"output={tmp_path}"]))
    assert state() == before
