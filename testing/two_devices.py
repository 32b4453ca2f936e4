"""A program for one of two processes that train together on the CPU; `test_devices.py` starts it.

Its argument is a list, in JSON, of runs: each is a list of overrides.
"""

import json
import os
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from lightning import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor

from dit4sr_pl import train as command
from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.train import train
from dit4sr_pl.training import leader

LATE = "LATE_DEVICE"  # environment variable: the device that sees a run's files late; errors are then printed


class WeightShare(Callback):
    """Writes the shares (0 to 1) of the frozen and the trained weights that this device has between steps.

    Args:
        output: folder for `share<device>.json`.
    """

    def __init__(self, output: str):
        self.output = Path(output)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: dict, batch_idx: int) -> None:
        """Writes the file before each batch."""
        shares = []
        for part in (pl_module.net.base, pl_module.net.trained):
            weights = list(part.parameters())
            local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
            shares.append(sum(weight.numel() for weight in local) / sum(weight.numel() for weight in weights))
        (self.output / f"share{trainer.global_rank}.json").write_text(json.dumps(shares))


def look_later() -> None:
    """Lets this device see a run's files late, as a machine does that asks a network file system at another time."""
    command.newest_checkpoint, command.finished_steps = lambda *_: None, lambda *_: 0
    has_size, asked = leader.has_size, []
    leader.has_size = lambda *of: bool(asked) and has_size(*of) or asked.append(of)


if __name__ == "__main__":
    late = os.environ.get(LATE)
    if late == os.environ["LOCAL_RANK"]:
        look_later()
    for overrides in json.loads(sys.argv[1]):
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            try:
                print("scores", train(compose("train", overrides)))
            except ValueError as error:
                if late is None:
                    raise
                print("refused", error)
