"""How far a training is: a bar in a terminal, a line every half minute elsewhere."""

import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, Timer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from dit4sr_pl.common.progress import in_terminal, in_words, sign
from dit4sr_pl.scores.results import run_name

log = logging.getLogger(__name__)

BAR_SECONDS = 1  # between two losses that the bar shows


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
        self.bar = bar and in_terminal()
        self.shown, self.task, self.bar_due, self.signs = None, None, 0.0, ExitStack()
        self.loss, self.validated = None, None

    def disable(self) -> None:
        """Shows nothing from here on: Lightning calls this in every process except that of rank 0."""
        self.enabled = False

    def enable(self) -> None:
        """Shows progress again."""
        self.enabled = True

    enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self.first_step = self.step = trainer.global_step
        self.steps, self.accumulated = trainer.max_steps, trainer.accumulate_grad_batches
        self.batches, self.began = 0, time.monotonic()
        self.timer = next((callback for callback in trainer.callbacks if isinstance(callback, Timer)), None)
        if self.enabled and self.bar:
            columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}")
            times = TextColumn("elapsed"), TimeElapsedColumn(), TextColumn("{task.fields[left]}")
            console = Console(stderr=True)
            self.shown = RichProgress(TextColumn("{task.description}"), *columns, *times, console=console)
            self.shown.start()
            self.task = self.shown.add_task("training", total=self.steps, completed=self.step, loss="", left="")
        elif self.enabled:
            self.signs.enter_context(sign(lambda: log.info("%s", self.line()), self.seconds))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Notes the step."""
        self.step, self.loss = trainer.global_step, pl_module.step_loss
        self.batches += 1
        if self.shown is not None:
            texts = {}
            if time.monotonic() >= self.bar_due:  # reading a loss waits for the device
                self.bar_due = time.monotonic() + BAR_SECONDS
                texts = {"loss": f"loss {self.loss.item():.3f}", "left": self.left()}
            self.shown.update(self.task, completed=self.step, **texts)

    def line(self) -> str:
        """Returns the progress in words, such as `demo/full/seed0: step 120 of 700, loss 0.412, about 4 min left`."""
        loss = "" if self.loss is None else f"loss {self.loss.item():.3f}"
        where = [f"step {self.step} of {self.steps}", self.validated, loss, self.left()]
        return f"{self.name}: {', '.join(filter(None, where))}"

    def left(self) -> str:
        """Returns the time left in words: that of the steps, or of `trainer.max_time` if that ends the run before."""
        texts, elapsed = {}, time.monotonic() - self.began
        if self.batches:
            done = self.batches / self.accumulated
            texts[elapsed / done * (self.steps - self.first_step - done)] = ""
        if self.timer is not None and (left := self.timer.time_remaining()) is not None:
            texts[max(left, 0.0)] = " (trainer.max_time)"
        return f"about {in_words(min(texts))} left{texts[min(texts)]}" if texts else f"{in_words(elapsed)} so far"

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says that training waits for a validation."""
        self.validated = "validating"
        if self.shown is not None:
            self.shown.update(self.task, description="validating")
        elif self.enabled:
            log.info("%s: validating at step %d", self.name, trainer.global_step)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Notes how much of a validation is done."""
        self.validated = f"validating, {batch_idx + 1} of {sum(trainer.num_val_batches)} batches"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says that training continues."""
        self.validated = None
        if self.shown is not None:
            self.shown.update(self.task, description="training")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the bar after an error or a signal."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Closes the bar and ends the lines."""
        self.signs.close()
        if self.shown is not None:
            self.shown.stop()
            self.shown = None
