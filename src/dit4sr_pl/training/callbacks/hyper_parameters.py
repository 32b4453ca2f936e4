"""What runs differ in, for TensorBoard's table."""

from lightning import Callback, LightningModule, Trainer
from tensorboard.plugins.hparams.summary_v2 import hparams_pb

from dit4sr_pl.training.callbacks.validation_scores import tensorboards


class HyperParameters(Callback):
    """Makes a run a row of TensorBoard's HPARAMS tab: the network's settings, then `columns`.

    The row is written into the run's own events when training starts; TensorBoard adds the last value of each of the
    run's scalars. A list of columns and metrics (an "experiment") is never written: TensorBoard would take one run's
    for all, without any it takes the union.

    Args:
        columns: further values by their names; those that are None are left out.
    """

    def __init__(self, columns: dict[str, str | float | bool | None]):
        self.columns = dict(columns)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        config = dict(pl_module.net.network_config())
        variant = config.pop("variant", {})  # which a baseline has not
        row = {name: value for name, value in {**config, **variant, **self.columns}.items() if value is not None}
        for writer in tensorboards(trainer):
            writer._get_file_writer().add_summary(hparams_pb(row, trial_id=""))  # "": a row of its own for every run
