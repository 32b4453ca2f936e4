"""A file with the loss of every batch, by which two runs can be compared."""

import logging
from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from dit4sr_pl.common.files import atomic_write
from dit4sr_pl.training.lightning_state import batches_done

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
        self.continued = False

    def remove_repeated_rows(self) -> None:
        """Removes the rows of batches that a resumed run repeats."""
        rows = self.path.read_text().splitlines()[1:] if self.path.exists() else []
        kept = [row for row in rows if int(row.split(",")[0]) <= self.batches]
        with atomic_write(self.path) as partial:
            partial.write_text("".join(f"{row}\n" for row in ["batch,loss", *kept]))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_) -> None:
        """Appends a row."""
        if trainer.is_global_zero and not self.continued:
            self.remove_repeated_rows()
            self.continued = True
        loss = pl_module.batch_loss.item()
        self.batches += 1
        if trainer.is_global_zero:
            try:
                with self.path.open("a") as file:
                    file.write(f"{self.batches},{loss}\n")
            except OSError as error:
                log.warning("%s: batch %d is not written (%s)", self.path, self.batches, error.strerror)
