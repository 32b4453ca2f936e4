"""One of two processes that train together on the CPU, started by `test_devices.py`. Its argument lists runs."""

import json
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from lightning import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.train import train


class WeightShare(Callback):
    """Writes how much of the network's weights this device holds between steps, in parts of 1: frozen, trained.

    Args:
        output: folder for `held<device>.json`.
    """

    def __init__(self, output: str):
        self.output = Path(output)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: dict, batch_idx: int) -> None:
        held = []
        for part in (pl_module.net.base, pl_module.net.trained):
            weights = list(part.parameters())
            local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
            held.append(sum(weight.numel() for weight in local) / sum(weight.numel() for weight in weights))
        (self.output / f"held{trainer.global_rank}.json").write_text(json.dumps(held))


if __name__ == "__main__":
    for overrides in json.loads(sys.argv[1]):
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            train(compose("train", overrides))
