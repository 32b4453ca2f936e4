"""The loss of every step as a file that two runs can be compared by."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from dit4sr_pl.common.files import atomic_write


class Losses(Callback):
    """Appends the loss of every batch to `folder/losses.csv` with all its digits; a resumed run goes on from its own.

    On several devices it is the mean over the global batch, as in TensorBoard. A loss is written before the step's
    checkpoint, so none is missing after a kill.
    """

    def __init__(self, folder: str):
        self.path = Path(folder) / "losses.csv"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            rows = self.path.read_text().splitlines()[1:] if self.path.exists() else []
            kept = [row for row in rows if int(row.split(",")[0]) <= batches_done(trainer)]
            with atomic_write(self.path) as partial:
                partial.write_text("".join(f"{row}\n" for row in ["batch,loss", *kept]))

    def on_train_batch_end(self, trainer: Trainer, *_) -> None:
        loss = trainer.callback_metrics["train/loss"].item()
        if trainer.is_global_zero:
            with self.path.open("a") as file:
                file.write(f"{batches_done(trainer)},{loss}\n")


def batches_done(trainer: Trainer) -> int:
    return trainer.fit_loop.total_batch_idx + 1
