"""Runs that are stopped and resumed in every way equal an undisturbed run; one process at a time writes to a folder."""

import importlib.metadata
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.plugins.environments import SLURMEnvironment
from omegaconf import OmegaConf

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.processes import children
from dit4sr_pl.model import load_part
from dit4sr_pl.model.training_state import is_whole
from dit4sr_pl.train import train
from dit4sr_pl.training.callbacks.checkpoints import Checkpoints
from dit4sr_pl.training.run_folder import checkpoints_in
from testing.commands import is_alive, wait_until
from testing.events import event
from testing.toy_runs import events, toy

STEPS = 6
LOSSES = ["+callbacks.losses._target_=dit4sr_pl.training.callbacks.Losses", "+callbacks.losses.folder=${output}"]
SMALL = [*LOSSES, "metrics=[psnr]", f"trainer.max_steps={STEPS}", "trainer.val_check_interval=3"]


def start(photos: Path, folder: Path, *overrides: str) -> dict[str, float]:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return train(compose("train", [*toy(photos, folder), *SMALL, *overrides]))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_part(folder / "lr_stream.safetensors").state


def steps(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in checkpoints_in(folder))


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory) -> Path:
    """Returns the folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    start(photos, folder)
    return folder


def assert_same_run(folder: Path, whole: Path) -> None:
    """Asserts that losses, averaged weights and everything in TensorBoard are equal to the last bit."""
    assert (folder / "losses.csv").read_text() == (whole / "losses.csv").read_text()
    ours, theirs = weights(folder), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = events(folder), events(whole)
    assert ours.Tags() == theirs.Tags()
    for tag in set(theirs.Tags()["scalars"]) - {"val/seconds"}:
        assert [(e.step, e.value) for e in ours.Scalars(tag)] == [(e.step, e.value) for e in theirs.Scalars(tag)]
    for kind, shown in (("images", "Images"), ("histograms", "Histograms")):
        for tag in theirs.Tags()[kind]:
            assert [e.step for e in getattr(ours, shown)(tag)] == [e.step for e in getattr(theirs, shown)(tag)]


def test_a_run_leaves_its_config_code_log_and_last_checkpoints(whole):
    assert steps(whole) == [4, 5, 6]
    assert (whole / "checkpoints" / "last.ckpt").resolve().name == "0000006.ckpt"
    assert OmegaConf.load(whole / "config.yaml").output == str(whole)
    code = OmegaConf.load(whole / "code.yaml")
    assert len(code.git) == 40 and code.packages.torch == importlib.metadata.version("torch")
    assert (whole / "train.log").exists()
    assert [line.split(",")[0] for line in (whole / "losses.csv").read_text().splitlines()[1:]] == list("123456")


@pytest.mark.slow
@pytest.mark.parametrize(
    "what, hook, at, left",
    [
        ("SIGTERM", "on_train_batch_start", 0, [1]),
        ("SIGTERM", "on_train_batch_start", 2, [2]),  # a validation follows
        ("SIGTERM", "on_validation_batch_start", 6, [2, 4, 5]),
    ],
)
def test_sigterm_saves_and_exits_with_143_and_the_same_command_goes_on(photos, tmp_path, whole, what, hook, at, left):
    every = ["callbacks.checkpoint.every_n_train_steps=4"]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        start(photos, tmp_path, *every, *event(what, hook, at))
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert steps(tmp_path) == left and not (tmp_path / "finished.yaml").exists()
    start(photos, tmp_path, *every)
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_ctrl_c_names_the_step_and_can_be_given_again(photos, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt, match="interrupted at step 1; the same command resumes"):
        start(photos, tmp_path, *event("SIGINT", "on_train_batch_start", 1))
    assert signal.signal(signal.SIGINT, before) == signal.default_int_handler


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_user_signal_saves_and_then_reaches_who_had_it_before(photos, tmp_path, signum):
    had, never = [], ["callbacks.checkpoint.every_n_train_steps=null", "trainer.limit_val_batches=0"]
    before = signal.signal(signum, lambda *_: had.append(steps(tmp_path)))
    try:
        start(photos, tmp_path, *never, *event(signum.name, "on_train_batch_start", 1))
    finally:
        signal.signal(signum, before)
    assert had == [[2]]


@pytest.mark.slow
def test_a_checkpoint_that_finds_the_disk_full_costs_nothing_but_itself(photos, tmp_path, whole, caplog):
    every = ["callbacks.checkpoint.every_n_train_steps=1", "callbacks.checkpoint.keep_last=9"]
    start(photos, tmp_path, *every, *event("full", "on_train_batch_start", 3))
    assert "0000004.ckpt: not saved (No space left on device); training continues" in caplog.text
    assert "not saved" in (tmp_path / "train.log").read_text()
    assert steps(tmp_path) == [1, 2, 3, 5, 6] and not list((tmp_path / "checkpoints").glob(".*"))
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_damaged_checkpoints_are_passed_over_for_the_one_before(photos, tmp_path, whole, caplog):
    every = ["callbacks.checkpoint.every_n_train_steps=1", "trainer.max_steps=5"]
    start(photos, tmp_path, *every)
    newest, second, _ = checkpoints_in(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-1000])  # cut off
    data = bytearray(second.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 128] = bytes(byte ^ 1 for byte in data[middle : middle + 128])  # padding has 63 at most
    second.write_bytes(data)
    start(photos, tmp_path)
    assert "0000005.ckpt: damaged" in caplog.text and "resuming from step 3" in caplog.text
    assert not is_whole(tmp_path / "checkpoints" / "0000005.ckpt.aside") and is_whole(checkpoints_in(tmp_path)[0])
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_minutes_make_checkpoints_too(photos, tmp_path):
    never = ["callbacks.checkpoint.every_n_train_steps=null", "trainer.limit_val_batches=0"]
    for minutes, left in (("1e-9", [1, 2, 3, 4]), ("1000", [3, 4])):
        options = [f"callbacks.checkpoint.every_n_minutes={minutes}", "callbacks.checkpoint.keep_last=9"]
        start(photos, tmp_path / minutes, *never, *options, "trainer.max_steps=4")
        assert steps(tmp_path / minutes) == left


@pytest.mark.slow
def test_workers_and_validation_change_nothing(photos, tmp_path, whole):
    start(photos, tmp_path, "data.num_workers=2", "trainer.limit_val_batches=0")
    assert (tmp_path / "losses.csv").read_text() == (whole / "losses.csv").read_text()


@pytest.mark.slow
def test_accumulated_gradients_are_never_saved_halfway(photos, tmp_path):
    options = ["trainer.accumulate_grad_batches=2", "trainer.max_steps=3", "trainer.limit_val_batches=0"]
    start(photos, tmp_path / "whole", *options)
    with pytest.raises(SystemExit):
        start(photos, tmp_path / "parts", *options, *event("SIGTERM", "on_train_batch_start", 1))
    assert steps(tmp_path / "parts") == [2]
    start(photos, tmp_path / "parts", *options)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_a_checkpoint_that_lightning_left_on_slurm_is_not_read(photos, tmp_path, whole, monkeypatch):
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"of another job")
    monkeypatch.setattr(SLURMEnvironment, "detect", staticmethod(lambda: True))
    monkeypatch.setenv("SLURM_NTASKS", "1")
    start(photos, tmp_path)
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_killed_runs_go_on_to_what_one_undisturbed_run_gives(photos, tmp_path, whole):
    """SIGKILL comes as soon as there is one more loss. Each start has another number of workers."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dit4sr_pl.train", "dit4sr_pl.training.module", "dit4sr_pl.training.callbacks"])
    losses = tmp_path / "losses.csv"
    for enough in (2, 4, STEPS):
        every = ["callbacks.checkpoint.every_n_train_steps=1", f"data.num_workers={enough % 3}"]
        process = context.Process(target=start, args=(photos, tmp_path, *every))
        process.start()
        while process.is_alive() and not (losses.exists() and losses.read_text().count("\n") > enough):
            time.sleep(0.01)
        workers = children(process.pid)
        if enough < STEPS:
            process.kill()
        process.join()
        wait_until(lambda workers=workers: not any(map(is_alive, workers)))
        assert process.exitcode == (-signal.SIGKILL if enough < STEPS else 0)
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_a_step_that_ends_with_its_checkpoint_is_in_tensorboard(photos, tmp_path, whole, monkeypatch):
    def end(*_) -> None:
        raise RuntimeError("killed")

    every = "callbacks.checkpoint.every_n_train_steps=1"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Checkpoints, "link", end)
        start(photos, tmp_path, every)
    assert steps(tmp_path) == [1]
    start(photos, tmp_path, every)
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_sigterm_to_a_whole_job_saves_on_all_devices_and_leaves_their_workers_alone(photos, tmp_path):
    """Schedulers send it to every process of a job. Here two devices with a worker each get it twice."""
    options = ["data.num_workers=1", "trainer.max_steps=100000", "trainer.limit_val_batches=0"]
    options += ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    arguments = [sys.executable, "-m", "dit4sr_pl.train", *toy(photos, tmp_path), *SMALL, *options]
    losses = tmp_path / "losses.csv"
    with (tmp_path / "output.log").open("w") as log:
        process = subprocess.Popen(arguments, start_new_session=True, stdout=log, stderr=log)
    while process.poll() is None and not (losses.exists() and losses.read_text().count("\n") > 1):
        time.sleep(0.05)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=300) == 143, (tmp_path / "output.log").read_text()
    newest = checkpoints_in(tmp_path)[0]
    assert is_whole(newest) and int(newest.stem) == losses.read_text().count("\n") - 1


def rows(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "losses.csv").read_text().splitlines()[1:]
    return [(int(batch), float(loss)) for batch, loss in (line.split(",") for line in lines)]


@pytest.fixture(scope="module")
def accumulated(photos, tmp_path_factory) -> Path:
    """Returns the folder of a run that begins with batches of two and goes on with twice one image, then again."""
    folder = tmp_path_factory.mktemp("accumulated")
    every = ["callbacks.checkpoint.every_n_train_steps=1", "trainer.log_every_n_steps=2", "callbacks=default"]
    halves = ["data.batch_size=1", "trainer.accumulate_grad_batches=2"]
    for steps, options in ((2, []), (4, halves), (STEPS, [])):
        start(photos, folder, *every, *options, "trainer.val_check_interval=2", f"trainer.max_steps={steps}")
    return folder


@pytest.fixture(scope="module")
def unaccumulated(photos, tmp_path_factory) -> Path:
    """Returns the folder of the same run in batches of two, never stopped."""
    folder = tmp_path_factory.mktemp("unaccumulated")
    start(photos, folder, "callbacks=default", "trainer.val_check_interval=2", "trainer.log_every_n_steps=2")
    return folder


@pytest.mark.slow
def test_another_accumulation_goes_on_with_the_global_batch(accumulated, unaccumulated):
    ours, theirs = rows(accumulated), [loss for _, loss in rows(unaccumulated)]
    assert [batch for batch, _ in ours] == list(range(1, 9))  # 2 + 2 x 2 + 2: each step has seen two images
    losses = [loss for _, loss in ours]
    means = [*losses[:2], (losses[2] + losses[3]) / 2, (losses[4] + losses[5]) / 2, *losses[6:]]
    assert means == pytest.approx(theirs, rel=1e-4)
    assert all(
        torch.allclose(weights(accumulated)[name], weight, atol=1e-6) for name, weight in weights(unaccumulated).items()
    )


@pytest.mark.slow
def test_validations_and_histograms_are_of_optimizer_steps_whatever_the_accumulation(accumulated):
    log = events(accumulated)
    assert [event.step + 1 for event in log.Scalars("val/psnr")] == [2, 4, 6]
    names = [tag for tag in log.Tags()["histograms"] if tag.startswith("degradation/")]
    for name in names:
        shown = [(event.step + 1, event.histogram_value.num) for event in log.Histograms(name)]
        assert shown == [(2, 2), (4, 2), (6, 2)]  # a value per image of the global batch
    assert names


@pytest.mark.slow
def test_the_last_step_is_validated_whatever_the_interval(photos, tmp_path):
    start(photos, tmp_path, "trainer.max_steps=2", "trainer.val_check_interval=5")
    assert [event.step + 1 for event in events(tmp_path).Scalars("val/psnr")] == [2]
    assert (tmp_path / "scores.csv").exists() and steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("limit", ["+trainer.limit_train_batches=3", "+trainer.overfit_batches=1"])
def test_a_limit_that_ends_within_a_step_is_refused(photos, tmp_path, limit):
    with pytest.raises(ValueError, match=r"must be a multiple of trainer.accumulate_grad_batches=2"):
        start(photos, tmp_path, limit, "trainer.accumulate_grad_batches=2")


@pytest.mark.slow
def test_a_limit_on_batches_leaves_no_gap_in_the_positions_of_an_accumulated_run(photos, tmp_path, unaccumulated):
    options = ["callbacks=default", "data.batch_size=1", "trainer.accumulate_grad_batches=2", "trainer.max_steps=3"]
    start(photos, tmp_path, *options, "+trainer.limit_train_batches=4", "trainer.limit_val_batches=0")
    losses, theirs = [loss for _, loss in rows(tmp_path)], [loss for _, loss in rows(unaccumulated)]
    means = [sum(losses[first : first + 2]) / 2 for first in (0, 2, 4)]
    assert means == pytest.approx(theirs[:3], rel=1e-4)


@pytest.mark.slow
def test_until_averaging_begins_the_trained_weights_are_validated_and_saved(photos, tmp_path, unaccumulated):
    start(
        photos, tmp_path, "callbacks.ema.update_starting_at_step=100", "trainer.val_check_interval=2", "overwrite=true"
    )
    ours, theirs = weights(tmp_path), weights(unaccumulated)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (events(folder).Scalars("val/psnr") for folder in (tmp_path, unaccumulated))
    assert [event.value for event in ours] == [event.value for event in theirs]


@pytest.mark.slow
def test_without_averaging_an_averaged_run_goes_on_from_its_trained_weights(photos, tmp_path, whole, unaccumulated):
    checkpoint = whole / "checkpoints" / "0000004.ckpt"
    start(photos, tmp_path, "callbacks=default", f"ckpt_path={checkpoint}", "trainer.limit_val_batches=0")
    ours, theirs = weights(tmp_path), weights(unaccumulated)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
