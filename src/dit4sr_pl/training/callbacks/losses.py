"""A file with the loss of every batch, by which two runs can be compared."""

import errno
import logging
import os
import re
from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from dit4sr_pl.common.files import atomic_write
from dit4sr_pl.training.lightning_state import batches_done

ROW = re.compile(r"(\d+),\S+\n")

log = logging.getLogger(__name__)


class Losses(Callback):
    """Appends the loss of every batch to `folder/losses.csv`, with all its digits; a resumed run continues the file.

    On several devices the loss is the mean over their batches, as in TensorBoard. It is written before the step's
    checkpoint, so that no loss is missing after a kill. Batches are counted over all starts of the run, with whatever
    accumulation each of them had.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: str):
        self.path = Path(folder) / "losses.csv"
        self.batches: int | None = None  # counted so far; None: a checkpoint does not say

    def state_dict(self) -> dict[str, int | None]:
        """Returns the number of batches for a checkpoint."""
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        """Reads the number of batches of a checkpoint."""
        self.batches = state["batches"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting."""
        if self.batches is None:
            self.batches = batches_done(trainer)
        self.first, self.continued = self.batches, False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_) -> None:
        """Appends a row; one that does not fit on the disk is a warning."""
        loss = pl_module.batch_loss.item()
        self.batches += 1
        if not trainer.is_global_zero:
            return
        try:
            if not self.continued:
                keep_rows(self.path, self.first)
                self.continued = True
            append_row(self.path, f"{self.batches},{loss}\n".encode())
        except OSError as error:
            log.warning("%s: batch %d is not written (%s)", self.path, self.batches, error.strerror)


def keep_rows(path: Path, batches: int) -> None:
    """Removes the rows of batches after a number, which a resumed run repeats, and what a kill cut off."""
    rows = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [match for row in rows if (match := ROW.fullmatch(row))]
    with atomic_write(path) as partial:
        partial.write_text("batch,loss\n" + "".join(match[0] for match in whole if int(match[1]) <= batches))


def append_row(path: Path, row: bytes) -> None:
    """Appends a row to a file; raises OSError, and leaves no part of it, if it does not fit."""
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        if file.write(row) < len(row):  # the system writes what fits
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
