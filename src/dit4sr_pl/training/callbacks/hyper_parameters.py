"""The settings in which runs differ, for TensorBoard's table."""

from lightning import Callback, LightningModule, Trainer
from tensorboard.plugins.hparams.summary_v2 import hparams_pb

from dit4sr_pl.common.secrets import without_secrets
from dit4sr_pl.model.trained_part import flat_config
from dit4sr_pl.training.callbacks.validation_scores import tensorboards
from dit4sr_pl.training.lightning_state import add_summary


class HyperParameters(Callback):
    """Makes the run a row of TensorBoard's HPARAMS tab: the network's settings, then `columns`.

    The row is written into the run's own events when training starts; TensorBoard adds the last value of each of the
    run's scalars. A list of columns and metrics (an "experiment") is never written: TensorBoard would use one run's
    list for all runs. Without any it shows the union of all rows' columns.

    Args:
        columns: further values by name; those that are None are left out.
    """

    def __init__(self, columns: dict[str, str | float | bool | None]):
        self.columns = dict(columns)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the row."""
        row = {**flat_config(pl_module.net.network_config()), **self.columns}
        row = {name: str(value) if isinstance(value, list) else value for name, value in row.items()}
        row = without_secrets({name: value for name, value in row.items() if value is not None})
        for writer in tensorboards(trainer):
            add_summary(writer, hparams_pb(row, trial_id=""))  # an empty id makes a row of its own for every run
