"""Scores and pictures of every validation, beside bicubic's."""

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchmetrics import MetricCollection

from dit4sr_pl.latents import enlarge
from dit4sr_pl.metrics import ImageScore


class ValidationScores(Callback):
    """Logs `val/<metric>` and `val/<metric>_bicubic`, and per image a strip LR | bicubic | restored | ground truth.

    Args:
        metrics: by the names that they are logged under.
    """

    def __init__(self, metrics: dict[str, ImageScore]):
        scores = MetricCollection(dict(metrics))
        self.restored = scores.clone(prefix="val/")
        self.bicubic = scores.clone(prefix="val/", postfix="_bicubic")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for scores in (self.restored, self.bicubic):
            scores.to(pl_module.device).reset()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Tensor, batch: dict, *_
    ) -> None:
        sr, hr = outputs, batch["hr"]
        bicubic = enlarge(batch["lr"], hr.shape[-2:])
        self.restored.update(sr, hr)
        self.bicubic.update(bicubic, hr)
        for name, *images in zip(batch["name"], batch["lr"], bicubic, sr, hr, strict=True):
            for writer in tensorboards(trainer):
                writer.add_image(f"val/{name}", strip(*images), trainer.global_step)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log_dict(self.restored.compute() | self.bicubic.compute(), sync_dist=True)


def strip(lr: Tensor, *images: Tensor) -> Tensor:
    """LR `(3, h, w)`, its pixels enlarged, and images `(3, H, W)` beside one another: `(3, H, n*W)`."""
    lr = F.interpolate(lr[None], size=images[0].shape[-2:], mode="nearest")[0]
    return torch.cat([lr, *images], dim=-1).cpu()


def tensorboards(trainer: Trainer) -> list[SummaryWriter]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger.experiment, SummaryWriter)]
