"""Lightning and PyTorch still behave as `training/lightning_state.py` takes for granted."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.tensorboard import SummaryWriter

from dit4sr_pl.training import lightning_state
from dit4sr_pl.training.callbacks import EMAWeightAveraging
from testing.toy_runs import events


class Endless(IterableDataset):
    """Training data without an end, as ours."""

    def __iter__(self):
        while True:
            yield torch.ones(32)


class Diary(Callback):
    """Notes the batch and the interval after every batch, and the batch before every validation.

    Args:
        skipped: the batch whose validation is skipped.
    """

    def __init__(self, skipped: int | None = None):
        self.skipped = skipped
        self.started_at = None
        self.batches, self.intervals, self.validated, self.terminated = [], set(), [], []

    def on_train_start(self, trainer, pl_module):
        self.started_at = lightning_state.batches_done(trainer)

    def on_train_batch_end(self, trainer, *_):
        self.batches.append(lightning_state.batches_done(trainer))
        self.intervals.add(lightning_state.validation_interval(trainer))
        if self.batches[-1] == self.skipped:
            lightning_state.limit_validation(trainer, 0)
            assert lightning_state.validation_interval(trainer) is None

    def on_train_batch_start(self, trainer, *_):
        lightning_state.limit_validation(trainer, 1.0)

    def on_validation_start(self, trainer, pl_module):
        self.validated.append(lightning_state.batches_done(trainer))


class Saves(Callback):
    """Saves `folder/last.ckpt` after every batch."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / "last.ckpt")


def fit(folder: Path, max_steps: int, *callbacks: Callback, ckpt_path=None, validate=True, **how) -> None:
    """Trains Lightning's example with the trainer's settings of `conf/trainer/default.yaml`."""
    trainer = Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[*callbacks, Saves(folder)],
        **how,
    )
    model = BoringModel()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers
        loaders = [DataLoader(Endless(), batch_size=1), DataLoader(torch.ones(2, 32)) if validate else []]
        trainer.fit(model, *loaders, ckpt_path=ckpt_path, weights_only=True)


def test_batches_count_on_after_a_resume_and_validations_follow_the_interval(tmp_path):
    diary = Diary(skipped=4)
    fit(tmp_path, 6, diary)
    assert (diary.started_at, diary.batches, diary.intervals) == (0, [1, 2, 3, 4, 5, 6], {2})
    assert diary.validated == [2, 6]  # not 4
    resumed = Diary()
    fit(tmp_path, 8, resumed, ckpt_path=tmp_path / "last.ckpt")
    assert (resumed.started_at, resumed.batches, resumed.validated) == (6, [7, 8], [8])


def test_batches_count_where_gradients_are_accumulated(tmp_path):
    diary = Diary()
    fit(tmp_path, 2, diary, accumulate_grad_batches=2)
    assert (diary.batches, diary.validated) == ([1, 2, 3, 4], [2, 4])


class CountsAnew(Callback):
    """Counts the batches of a checkpoint anew, and notes the optimizer steps after each batch."""

    def __init__(self):
        self.steps, self.follows = [], []

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        lightning_state.count_batches_anew(trainer, checkpoint)

    def on_train_batch_end(self, trainer, *_):
        self.steps.append(trainer.global_step)
        self.follows.append(lightning_state.validation_follows(trainer))


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (3, 2)])
def test_batches_counted_anew_make_whole_steps_with_another_accumulation(tmp_path, before, after):
    fit(tmp_path, 3, accumulate_grad_batches=before)
    resumed, diary = CountsAnew(), Diary()
    how = {"ckpt_path": tmp_path / "last.ckpt", "accumulate_grad_batches": after}
    fit(tmp_path, 5, resumed, diary, **how)
    assert resumed.steps == ([3, 4, 4, 5] if after == 2 else [4, 5])
    assert diary.batches == list(range(3 * after + 1, 5 * after + 1))
    assert [batch for batch, follows in zip(diary.batches, resumed.follows, strict=True) if follows] == diary.validated


def test_a_limit_on_batches_of_another_run_does_not_hold(tmp_path):
    """The checkpoint lies at the second batch of its epoch of three; without a limit there are no epochs."""
    for before, after in (({"limit_train_batches": 3}, {}), ({}, {"limit_train_batches": 3})):
        fit(tmp_path, 5, CountsAnew(), **before)
        resumed, diary = CountsAnew(), Diary()
        fit(tmp_path, 8, resumed, diary, ckpt_path=tmp_path / "last.ckpt", **after)
        assert resumed.steps == [6, 7, 8] and diary.batches == [6, 7, 8]


def test_options_of_float16s_scaler_are_those_of_the_run():
    then, now = (torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=n) for n in (10, 20))
    checkpoint = {"callbacks": {}, "MixedPrecision": then.state_dict() | {"scale": 64.0, "_growth_tracker": 7}}
    trainer = SimpleNamespace(callbacks=[], precision_plugin=MixedPrecision("16-mixed", "cpu", now))
    lightning_state.keep_options(trainer, checkpoint)
    now.load_state_dict(checkpoint["MixedPrecision"])
    assert (now.get_scale(), now.get_growth_interval(), now.state_dict()["_growth_tracker"]) == (64.0, 20, 7)


def test_a_run_that_stops_validates_whatever_the_interval(tmp_path):
    class Stops(CountsAnew):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 3
            super().on_train_batch_end(trainer)

    stops, diary = Stops(), Diary()
    fit(tmp_path, 9, stops, diary)
    assert (stops.steps, stops.follows, diary.validated) == ([1, 2, 3], [False, True, True], [2, 3])


def test_without_validation_images_there_is_no_interval(tmp_path):
    diary = Diary()
    fit(tmp_path, 2, diary, validate=False)
    assert diary.intervals == {None}


def test_lightning_keeps_a_sigterm_that_came_before_the_training(tmp_path):
    class Terminated(Callback):
        received = None

        def setup(self, trainer, pl_module, stage):
            assert not lightning_state.received_sigterm(trainer)

        def on_train_start(self, trainer, pl_module):
            os.kill(os.getpid(), signal.SIGTERM)
            self.received = lightning_state.received_sigterm(trainer)
            raise KeyboardInterrupt

    callback = Terminated()
    with pytest.raises(SystemExit):
        fit(tmp_path, 1, callback)
    assert callback.received


def test_started_processes_get_the_signal():
    lightning_state.signal_started_processes(Trainer(accelerator="cpu", logger=False), signal.SIGTERM)  # starts none
    strategy = DDPStrategy(cluster_environment=LightningEnvironment())
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    trainer.strategy.launcher.procs.append(started)
    lightning_state.signal_started_processes(trainer, signal.SIGTERM)
    assert started.wait(30) == -signal.SIGTERM


def test_gradients_of_a_fused_optimizer_can_be_clipped_in_half_precision():
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], fused=True)
    with pytest.raises(RuntimeError, match="gradient clipping"):
        precision.clip_gradients(optimizer, 1.0)
    lightning_state.let_trainer_unscale(optimizer)
    weight.grad = torch.full((2,), 10.0)
    precision.clip_gradients(optimizer, 1.0)
    assert weight.grad.norm() == pytest.approx(1)


def test_a_checkpoint_of_an_averaged_run_also_has_the_trained_weights(tmp_path):
    fit(tmp_path, 2, EMAWeightAveraging(decay=0.5))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    trained = lightning_state.weights_before_averaging(checkpoint)
    assert trained.keys() == checkpoint["state_dict"].keys()
    assert not torch.equal(trained["layer.weight"], checkpoint["state_dict"]["layer.weight"])
    fit(tmp_path, 1)
    assert lightning_state.weights_before_averaging(torch.load(tmp_path / "last.ckpt", weights_only=True)) is None


def test_a_summary_reaches_the_event_file(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        lightning_state.add_summary(writer, hparams_pb({"seed": 1}, trial_id=""))
    assert "_hparams_/session_start_info" in events(tmp_path).summary_metadata
