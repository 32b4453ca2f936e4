"""TensorBoard's events on a disk that may be full: a lost event is a warning, not the end of a training."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

PAUSE = 60  # seconds after an error until events are written again, to a new file


class EventLogger(TensorBoardLogger):
    """Lightning's logger with a `TolerantWriter`, which drops what it is given twice; arguments are Lightning's."""

    latest: tuple[int | None, dict[str, float]] | None = None  # step and metrics of the last call

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Writes the metrics of a step, unless the last call wrote them: a checkpoint may log its step beforehand."""
        if self.latest != (step, dict(metrics)):
            super().log_metrics(metrics, step)
        self.latest = step, dict(metrics)

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """The writer of this run."""
        if self._experiment is None:
            self._experiment = TolerantWriter(log_dir=self.log_dir, **self._kwargs)
        return self._experiment

    def save(self) -> None:
        """Flushes the events; there are no hyperparameters of Lightning's to save."""
        self.experiment.flush()


class TolerantWriter(SummaryWriter):
    """A writer that continues after an OSError: it drops its file, and opens a new one later."""

    retry_at = 0.0

    def _get_file_writer(self) -> Any:
        if time.monotonic() < self.retry_at:
            return Tolerant(None, self.give_up)
        opened = []
        self.try_to(lambda: opened.append(super(TolerantWriter, self)._get_file_writer()))
        return Tolerant(opened[0] if opened else None, self.give_up)

    def flush(self) -> None:
        """Writes all events so far to the disk."""
        self.try_to(super().flush)

    def close(self) -> None:
        """Flushes and closes the file."""
        self.try_to(super().close)

    def try_to(self, do: Callable[[], Any]) -> None:
        """Calls a function; an OSError is logged."""
        try:
            do()
        except OSError as error:
            self.give_up(error)

    def give_up(self, error: OSError) -> None:
        """Drops the file, whose thread has ended with the error."""
        log.warning("%s: events are not logged for %d s (%s)", self.log_dir, PAUSE, error.strerror)
        self.file_writer = self.all_writers = None
        self.retry_at = time.monotonic() + PAUSE


class Tolerant:
    """A file writer of TensorBoard's, or nothing, whose methods hand an OSError to a function.

    Args:
        writer: the file writer; None: its methods do nothing.
        give_up: called with the error.
    """

    def __init__(self, writer: Any, give_up: Callable[[OSError], None]):
        self.writer, self.give_up = writer, give_up

    def __getattr__(self, name: str) -> Callable:
        def call(*arguments: Any, **named: Any) -> Any:
            try:
                return getattr(self.writer, name)(*arguments, **named) if self.writer is not None else None
            except OSError as error:
                self.give_up(error)

        return call
