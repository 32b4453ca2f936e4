"""Callbacks by which tests disturb a training run at a given step."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer


class Event(Callback):
    """Sends a signal to its own process, or lets the disk be full, at one step.

    Args:
        what: name of the signal, or `full`: the checkpoint after this step is written to a full disk.
        hook: name of Lightning's hook in which it happens.
        steps: optimizer steps done by then.
    """

    def __init__(self, what: str, hook: str, steps: int):
        self.what, self.steps = what, steps
        setattr(self, hook, self.disturb)

    def disturb(self, trainer: Trainer, *_) -> None:
        """Takes the place of the hook."""
        if trainer.global_step == self.steps:
            if self.what == "full":
                save = torch.save
                torch.save = lambda checkpoint, file: fill(save, checkpoint)
            else:
                os.kill(os.getpid(), signal.Signals[self.what])


def fill(save: Callable, checkpoint: dict) -> None:
    """Writes a checkpoint to a full disk; the next one is written as usual."""
    torch.save = save
    with open("/dev/full", "wb") as file:
        save(checkpoint, file)


def event(what: str, hook: str, steps: int) -> list[str]:
    """Returns the overrides that add an `Event` to a run."""
    return [f"+callbacks.monitor={{_target_: testing.events.Event, what: {what}, hook: {hook}, steps: {steps}}}"]


class FillDisk(Callback):
    """Fills the file system of a folder at one step and frees it again at another.

    Args:
        folder: a folder on the file system.
        full_at: optimizer steps done when it becomes full.
        free_at: optimizer steps done when there is space again.
    """

    def __init__(self, folder: str, full_at: int, free_at: int):
        self.ballast, self.full_at, self.free_at = Path(folder) / "ballast", full_at, free_at

    def on_train_batch_start(self, trainer: Trainer, *_) -> None:
        """Fills or frees."""
        if trainer.global_step == self.full_at and not self.ballast.exists():
            with suppress(OSError), self.ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        if trainer.global_step == self.free_at:
            self.ballast.unlink(missing_ok=True)


class Exit(Callback):
    """Ends the process with an error at one step, without a checkpoint.

    Args:
        hook: name of Lightning's hook in which it happens.
        steps: optimizer steps done by then.
    """

    def __init__(self, hook: str, steps: int):
        self.steps = steps
        setattr(self, hook, self.exit)

    def exit(self, trainer: Trainer, *_) -> None:
        """Takes the place of the hook."""
        if trainer.global_step == self.steps:
            raise SystemExit(1)


class Threads(Callback):
    """Writes the number of PyTorch's threads to `folder/threads`, and sends SIGTERM to its own process in one run.

    Args:
        folder: the run's folder.
        seed: the run's seed.
        stopped: the seed of the run that gets SIGTERM; None: no run.
    """

    def __init__(self, folder: str, seed: int, stopped: int | None):
        self.folder, self.stops = Path(folder), seed == stopped

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the number of threads."""
        (self.folder / "threads").write_text(str(torch.get_num_threads()))

    def on_train_batch_start(self, *_) -> None:
        """Sends SIGTERM before each batch."""
        if self.stops:
            os.kill(os.getpid(), signal.SIGTERM)
