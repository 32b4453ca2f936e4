"""Callbacks that tests add to a training run: something happens at a given moment."""

import os
import signal
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer


class Event(Callback):
    """Does something at a moment of the training.

    Args:
        what: name of a signal that the process gets, or `full`: the checkpoint after this step goes to a full disk.
        hook: where, after so many `steps`.
    """

    def __init__(self, what: str, hook: str, steps: int):
        self.what, self.steps = what, steps
        setattr(self, hook, self.happen)

    def happen(self, trainer, *_) -> None:
        if trainer.global_step == self.steps:
            if self.what == "full":
                folder = trainer.checkpoint_callback.folder
                (folder / f".{self.steps + 1:07d}.ckpt.partial").symlink_to("/dev/full")
            else:
                os.kill(os.getpid(), signal.Signals[self.what])


def event(what: str, hook: str, steps: int) -> list[str]:
    return [f"+callbacks.event={{_target_: testing.events.Event, what: {what}, hook: {hook}, steps: {steps}}}"]


class Threads(Callback):
    """Writes down how many threads PyTorch takes; gets one run a SIGTERM."""

    def __init__(self, folder: str, seed: int, stopped: int | None):
        self.folder, self.stops = Path(folder), seed == stopped

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (self.folder / "threads").write_text(str(torch.get_num_threads()))

    def on_train_batch_start(self, *_) -> None:
        if self.stops:
            os.kill(os.getpid(), signal.SIGTERM)
