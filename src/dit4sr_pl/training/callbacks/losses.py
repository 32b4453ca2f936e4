"""A file with the loss of every batch, by which two runs can be compared."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from dit4sr_pl.common.files import atomic_write
from dit4sr_pl.training.lightning_state import batches_done


class Losses(Callback):
    """Appends the loss of every batch to `folder/losses.csv`, with all its digits; a resumed run continues the file.

    On several devices the loss is the mean over the global batch, as in TensorBoard. It is written before the step's
    checkpoint, so that no loss is missing after a kill.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: str):
        self.path = Path(folder) / "losses.csv"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the rows of batches that a resumed run repeats."""
        if trainer.is_global_zero:
            rows = self.path.read_text().splitlines()[1:] if self.path.exists() else []
            kept = [row for row in rows if int(row.split(",")[0]) <= batches_done(trainer)]
            with atomic_write(self.path) as partial:
                partial.write_text("".join(f"{row}\n" for row in ["batch,loss", *kept]))

    def on_train_batch_end(self, trainer: Trainer, *_) -> None:
        """Appends a row."""
        loss = trainer.callback_metrics["train/loss"].item()
        if trainer.is_global_zero:
            with self.path.open("a") as file:
                file.write(f"{batches_done(trainer)},{loss}\n")
