"""Checkpoints that are whole or not there, at intervals of steps and minutes and when a scheduler asks for one."""

import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import TorchCheckpointIO

from dit4sr_pl.files import replacing

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints beside their place and moves them there when they are on the disk.

    Lightning's own way holds them in memory and copies them from /tmp, which a kill can interrupt. A checkpoint that
    cannot be written, for a full disk or other reasons, leaves no trace but an error in the log: training goes on.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        try:
            with replacing(Path(path)) as partial, partial.open("wb") as file:
                torch.save(checkpoint, file)
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # PyTorch's writer hides an OSError behind a RuntimeError
            if (cause := os_error(error)) is None:
                raise
            log.error("%s: not saved (%s); training goes on without it", path, cause.strerror)


def os_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


class Checkpoints(Checkpoint):
    """Saves `folder/NNNNNNN.ckpt` by step, keeps the last few, and lets `last.ckpt` lead to the newest.

    A checkpoint is written every so many steps and minutes, at the end, and before a step that a validation follows:
    a run stopped in the validation repeats that step. One that falls due together with a validation is written after
    it, so that none is resumed between a step and its validation.

    SIGTERM saves one after the running step, or ends a running validation, and exits with 143. SIGUSR1 and SIGUSR2
    save one and hand the signal on to whoever had it before the training, such as submitit, which requeues the job. On
    several devices a signal or clock of one counts for all.

    Args:
        folder: nothing else is written there.
        every_n_train_steps, every_n_minutes: since the start, since the last checkpoint; None for never.
        keep_last: how many of the newest stay.
    """

    def __init__(self, folder: str, every_n_train_steps: int | None, every_n_minutes: float | None, keep_last: int):
        self.folder = Path(folder)
        self.every_n_train_steps, self.every_n_minutes = every_n_train_steps, every_n_minutes
        self.keep_last = keep_last
        self.received: set[int] = set()
        self.heard: set[int] = set()  # those of any device that the last step knew of
        self.pending = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's own handlers come after this."""
        self.before = {signum: signal.getsignal(signum) for signum in SIGNALS}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the place of Lightning's handlers, which on SLURM write and prefer a checkpoint of their own."""
        self.step, self.saved_at = trainer.global_step, time.monotonic()
        self.saved_step = self.step
        self.leads, self.launcher = trainer.is_global_zero, trainer.strategy.launcher
        if trainer.received_sigterm:  # Lightning's would end the run with exit code 0
            self.answer({signal.SIGTERM})
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                signal.signal(signum, self.receive)  # until Lightning puts back what was there before the training

    def receive(self, signum: int, frame: FrameType | None) -> None:
        self.received.add(signum)
        if signum == signal.SIGTERM and self.launcher is not None:
            self.launcher.kill(signum)  # to the processes that this one started

    def on_train_batch_end(self, trainer: Trainer, *_) -> None:
        if trainer.global_step == self.step:
            return  # gradients accumulate
        self.step = trainer.global_step
        received = set(self.received)
        if on_any_device(trainer, bool(received)):
            self.heard |= {signum for signum in SIGNALS if on_any_device(trainer, signum in received)}
        self.pending |= bool(self.heard) | on_any_device(trainer, self.is_due(trainer))
        if self.pending and not validation_within(trainer, 0):  # else the checkpoint of the step before stands
            self.save(trainer)

    def on_train_batch_start(self, trainer: Trainer, *_) -> None:
        """By now the last step is logged."""
        if self.heard:
            end = None
            try:
                self.answer(self.heard)
            except SystemExit as asked:
                end = asked
            if on_any_device(trainer, end is not None):  # submitit ends rank 0 only
                raise end or SystemExit(0)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the end of a run that `trainer.max_time` stops, whose last step nobody knew beforehand."""
        if self.step != self.saved_step:
            self.save(trainer)

    def is_due(self, trainer: Trainer) -> bool:
        if self.step == trainer.max_steps or self.step + 1 == trainer.max_steps:
            return True
        minutes = (time.monotonic() - self.saved_at) / 60
        return (
            (self.every_n_train_steps is not None and self.step % self.every_n_train_steps == 0)
            or (self.every_n_minutes is not None and minutes >= self.every_n_minutes)
            or validation_within(trainer, trainer.accumulate_grad_batches)
        )

    def on_validation_batch_end(self, trainer: Trainer, *_) -> None:
        self.answer(self.received)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.pending:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        path = self.folder / f"{self.step:07d}.ckpt"
        for logger in trainer.loggers:
            logger.save()  # what was logged up to here is not written again after a resume
        trainer.save_checkpoint(path)
        self.pending, self.saved_at, self.saved_step = False, time.monotonic(), self.step
        if trainer.is_global_zero and path.exists():
            with replacing(self.folder / "last.ckpt") as partial:
                partial.unlink(missing_ok=True)
                partial.symlink_to(path.name)
            for old in sorted(self.folder.glob("[0-9]*.ckpt"))[: -self.keep_last]:
                old.unlink()

    def answer(self, signals: set[int]) -> None:
        """Does what signals ask for beside a checkpoint."""
        if signal.SIGTERM in signals:
            log.info("SIGTERM: stopped at step %d", self.step)
            # Rank 0 speaks for the run: Lightning kills it when a process that it has started ends with another code.
            raise SystemExit(128 + signal.SIGTERM if self.leads else 0)
        for signum in list(signals):
            log.info("%s at step %d", signal.Signals(signum).name, self.step)
            self.received.discard(signum)
            signals.discard(signum)
            if callable(self.before[signum]):
                self.before[signum](signum, None)


def on_any_device(trainer: Trainer, decision: bool) -> bool:
    return trainer.strategy.reduce_boolean_decision(decision, all=False)


def validation_within(trainer: Trainer, batches: int) -> bool:
    """Whether a validation comes after the batch that just ended, or before so many more have ended."""
    loop = trainer.fit_loop.epoch_loop
    if loop.val_loop.skip or trainer.limit_val_batches == 0 or trainer.val_check_batch is None:
        return False
    done, every = loop.total_batch_idx + 1, trainer.val_check_batch
    return done % every == 0 if batches == 0 else (done + batches) // every > done // every
