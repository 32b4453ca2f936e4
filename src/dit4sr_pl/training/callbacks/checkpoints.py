"""Checkpoints that are never half-written, at intervals of steps and minutes and on a scheduler's signals."""

import logging
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

from dit4sr_pl.common.files import atomic_write
from dit4sr_pl.training.lightning_state import (
    batches_done,
    log_step,
    received_sigterm,
    signal_started_processes,
    validation_follows,
    validation_interval,
)
from dit4sr_pl.training.run_folder import by_step

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints under a temporary name and renames them when they are on the disk.

    Lightning itself builds a checkpoint in memory and copies it from /tmp, which a kill can interrupt. If a checkpoint
    cannot be written, for example because the disk is full, the error is logged, no file stays, and training continues.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint, or logs the OSError that prevents it."""
        try:
            with atomic_write(Path(path)) as partial, partial.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # PyTorch's writer hides an OSError behind a RuntimeError
            if (cause := os_error(error)) is None:
                raise
            log.error("%s: not saved (%s); training continues without it", path, cause.strerror)


def os_error(error: BaseException | None) -> OSError | None:
    """Returns the first OSError among an error and its causes; None: there is none."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


class Checkpoints(Checkpoint):
    """Saves `folder/NNNNNNN.ckpt` by step, keeps the last few, and links `last.ckpt` to the newest.

    A checkpoint is written at the given intervals, at the end, and one step before a validation, so that a run stopped
    in the validation repeats one step. A checkpoint that is due together with a validation is written after it: no run
    is resumed between a step and its validation.

    SIGTERM saves a checkpoint after the running step, or ends a running validation, and exits with 143. SIGUSR1 and
    SIGUSR2 save one and call the handler from before the training, such as submitit's, which requeues the job. On
    several devices a signal to one device, or the clock of one, counts for all.

    Args:
        folder: folder of the checkpoints; nothing else may be in it.
        every_n_train_steps: interval in steps, counted from the run's start; None: no such interval.
        every_n_minutes: interval in minutes since the last checkpoint; None: no such interval.
        keep_last: number of checkpoints that are kept.
    """

    def __init__(self, folder: str, every_n_train_steps: int | None, every_n_minutes: float | None, keep_last: int):
        self.folder = Path(folder)
        self.every_n_train_steps, self.every_n_minutes = every_n_train_steps, every_n_minutes
        self.keep_last = keep_last
        self.received: set[int] = set()
        self.heard: set[int] = set()  # signals to any device, as of the last step
        self.pending, self.linked = False, True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remembers the signal handlers; Lightning installs its own after this."""
        self.before = {signum: signal.getsignal(signum) for signum in SIGNALS}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replaces Lightning's handlers, which on SLURM write and prefer a checkpoint of their own."""
        self.step, self.saved_at = trainer.global_step, time.monotonic()
        self.trainer = trainer
        if received_sigterm(trainer):  # Lightning would end the run with exit code 0
            self.answer({signal.SIGTERM})
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                signal.signal(signum, self.receive)  # Lightning restores the former handlers after the training

    def receive(self, signum: int, frame: FrameType | None) -> None:
        """Notes a signal until the running step ends, and forwards SIGTERM to the processes of further devices."""
        self.received.add(signum)
        if signum == signal.SIGTERM:
            signal_started_processes(self.trainer, signum)

    def on_train_batch_end(self, trainer: Trainer, *_) -> None:
        """Saves a checkpoint if one is due and no validation follows."""
        if trainer.global_step == self.step:
            return  # gradients are still being accumulated
        self.step = trainer.global_step
        received = set(self.received)
        if on_any_device(trainer, bool(received)):
            self.heard |= {signum for signum in SIGNALS if on_any_device(trainer, signum in received)}
        self.pending |= bool(self.heard) | on_any_device(trainer, self.is_due(trainer))
        if self.pending and not validation_follows(trainer):  # before a validation the last checkpoint is enough
            log_step(trainer)  # a resumed run does not log this step again
            self.save(trainer)

    def on_train_batch_start(self, trainer: Trainer, *_) -> None:
        """Answers the signals of the last step, which is logged by now."""
        if self.heard:
            end = None
            try:
                self.answer(self.heard)
            except SystemExit as asked:
                end = asked
            if on_any_device(trainer, end is not None):  # submitit ends rank 0 only
                raise end or SystemExit(0)

    def is_due(self, trainer: Trainer) -> bool:
        """Returns whether a checkpoint is due after this step, by this device's clock."""
        if trainer.should_stop or trainer.max_steps in (self.step, self.step + 1):
            return True
        minutes = (time.monotonic() - self.saved_at) / 60
        return (
            (self.every_n_train_steps is not None and self.step % self.every_n_train_steps == 0)
            or (self.every_n_minutes is not None and minutes >= self.every_n_minutes)
            or validation_after_next_step(trainer)
        )

    def on_validation_batch_end(self, trainer: Trainer, *_) -> None:
        """Answers signals within a validation at once."""
        self.answer(self.received)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the checkpoint that was due together with the validation, or if its scores end the run."""
        if self.pending or trainer.should_stop:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Saves a checkpoint of this step and removes the oldest ones."""
        path = self.folder / f"{self.step:07d}.ckpt"
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(path)
        self.pending, self.saved_at = False, time.monotonic()
        if trainer.is_global_zero and path.exists():
            self.link(path.name)
            for old in by_step(self.folder)[self.keep_last :]:
                try:
                    old.unlink()
                except OSError as error:
                    log.warning("%s: not removed (%s)", old, error.strerror)

    def link(self, newest: str) -> None:
        """Links `last.ckpt` to the newest checkpoint; nothing reads it, so a file system without links does no harm."""
        try:
            with atomic_write(self.folder / "last.ckpt") as partial:
                partial.unlink()
                partial.symlink_to(newest)
        except OSError as error:
            if self.linked:
                log.warning("%s: not linked to %s (%s)", self.folder / "last.ckpt", newest, error.strerror)
            self.linked = False

    def answer(self, signals: set[int]) -> None:
        """Exits on SIGTERM; calls the former handlers of other signals."""
        if signal.SIGTERM in signals:
            log.info("SIGTERM: stopped at step %d", self.step)
            # Only rank 0 exits with 143: Lightning kills it if a process that it started ends with a code other than 0.
            raise SystemExit(128 + signal.SIGTERM if self.trainer.is_global_zero else 0)
        for signum in list(signals):
            log.info("%s at step %d", signal.Signals(signum).name, self.step)
            self.received.discard(signum)
            signals.discard(signum)
            if callable(self.before[signum]):
                self.before[signum](signum, None)


def on_any_device(trainer: Trainer, decision: bool) -> bool:
    """Returns whether the decision is True on at least one device."""
    return trainer.strategy.reduce_boolean_decision(decision, all=False)


def validation_after_next_step(trainer: Trainer) -> bool:
    """Returns whether a validation follows the next step."""
    if (interval := validation_interval(trainer)) is None:
        return False
    return (batches_done(trainer) + trainer.accumulate_grad_batches) % interval == 0
