"""How far a training is: a bar in a terminal, a line every half minute elsewhere."""

import logging
import sys
import time
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from dit4sr_pl.scores.results import run_name

log = logging.getLogger(__name__)

LOSS_SECONDS = 1  # between two losses that the bar shows


class Progress(ProgressBar):
    """Steps done, steps to do and the time left of a training and of its validations.

    Lightning's own bars count epochs, which this project's endless training data do not have.

    Args:
        folder: the run's folder; lines begin with its name.
        bar: False: lines in a terminal too, for runs side by side.
        seconds: between two lines.
    """

    def __init__(self, folder: str | Path, bar: bool = True, seconds: float = 30):
        super().__init__()
        self.name, self.seconds = run_name(folder), seconds
        self.bar = bar and sys.stderr.isatty()
        self.shown, self.task, self.line_due, self.loss_due = None, None, 0.0, 0.0

    def disable(self) -> None:
        """Shows nothing from here on: Lightning calls this in every process except that of rank 0."""
        self.enabled = False

    def enable(self) -> None:
        """Shows progress again."""
        self.enabled = True

    enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self.first_step, self.began = trainer.global_step, time.monotonic()
        self.line_due = self.began + min(10, self.seconds)  # the first line soon: it says how long the run takes
        if self.enabled and self.bar:
            columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}")
            times = TextColumn("elapsed"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
            console = Console(stderr=True)
            self.shown = RichProgress(TextColumn("{task.description}"), *columns, *times, console=console)
            self.shown.start()
            self.task = self.shown.add_task("training", total=trainer.max_steps, completed=self.first_step, loss="")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Shows the step."""
        if self.shown is not None:
            text = {}
            if time.monotonic() >= self.loss_due:  # reading a loss waits for the device
                self.loss_due, text = time.monotonic() + LOSS_SECONDS, {"loss": loss_of(trainer)}
            self.shown.update(self.task, completed=trainer.global_step, **text)
        elif self.enabled and time.monotonic() >= self.line_due and trainer.global_step > self.first_step:
            self.line_due = time.monotonic() + self.seconds
            log.info("%s", self.line(trainer))

    def line(self, trainer: Trainer) -> str:
        """Returns the progress in words, such as `demo/full/seed0: step 120 of 700, loss 0.412, about 4 min left`."""
        step, steps = trainer.global_step, trainer.max_steps
        left = (time.monotonic() - self.began) / (step - self.first_step) * (steps - step)
        return f"{self.name}: step {step} of {steps}, {loss_of(trainer)}, about {in_words(left)} left"

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says that training waits for a validation."""
        if self.shown is not None:
            self.shown.update(self.task, description="validating")
        elif self.enabled:
            log.info("%s: validating at step %d", self.name, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says that training continues."""
        if self.shown is not None:
            self.shown.update(self.task, description="training")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the bar after an error or a signal."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Closes the bar."""
        if self.shown is not None:
            self.shown.stop()
            self.shown = None


def loss_of(trainer: Trainer) -> str:
    """Returns `loss 0.412`, that of the newest step."""
    loss = trainer.callback_metrics.get("train/loss")
    return "" if loss is None else f"loss {loss.item():.3f}"


def in_words(seconds: float) -> str:
    """Returns a time as `40 s`, `12 min` or `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
