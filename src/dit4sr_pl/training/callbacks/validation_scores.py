"""Scores and images of every validation, next to those of bicubic enlargement."""

import logging
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dit4sr_pl.images.files import write_image
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.scores.metrics import ImageScore
from dit4sr_pl.scores.results import PICTURES
from dit4sr_pl.training.lightning_state import from_all_devices, limit_validation, validation_follows

log = logging.getLogger(__name__)

Scores = dict[str, float]  # of one image, by metric


class ValidationScores(Callback):
    """Logs `val/<metric>` and `val/<metric>_bicubic`, and per image a strip LR | bicubic | restored | ground truth.

    Scores against the sharpened HR images that some degradations train on are logged as `val_sharpened/<metric>`: they
    cannot be compared with those of a benchmark.
    After a validation `restored` and `bicubic` hold the scores of all images by name, on every device, and
    `folder/images/` holds the restored images. Metrics without weights are not logged. The last step is followed by a
    validation, whatever the interval, so that the run's scores are those of the weights that it leaves. All devices
    skip a validation if the earlier ones took more than `max_share` of the run's time, except the last one.

    Args:
        metrics: the metrics by the name that they are logged under.
        max_share: between 0 and 1; None: no validation is skipped.
        folder: the run's folder.
    """

    def __init__(self, metrics: dict[str, ImageScore], max_share: float | None, folder: str):
        self.metrics = dict(metrics)
        self.max_share = max_share
        self.pictures = Path(folder) / PICTURES
        self.restored: dict[str, Scores] = {}
        self.bicubic: dict[str, Scores] = {}  # measured once, since the images never change

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self.limit = trainer.limit_val_batches
        self.tag = "val_sharpened" if trainer.datamodule.validation_name == "validation_sharpened" else "val"
        self.began, self.spent = time.monotonic(), 0.0

    def on_train_batch_start(self, trainer: Trainer, *_) -> None:
        """Allows validations again after a skipped one."""
        limit_validation(trainer, self.limit)

    def on_train_batch_end(self, trainer: Trainer, *_) -> None:
        """Asks for a validation after the last step; skips another one if the earlier ones took too much time."""
        trainer.should_stop |= 0 <= trainer.max_steps <= trainer.global_step
        if self.may_be_skipped(trainer) and (share := self.share_too_large(trainer)):
            limit_validation(trainer, 0)
            if trainer.is_global_zero:
                log.warning(
                    "step %d: validation skipped, the earlier ones took %.0f%% of the run's time "
                    "(callbacks.scores.max_share=%s)",
                    *(trainer.global_step, 100 * share, self.max_share),
                )

    def may_be_skipped(self, trainer: Trainer) -> bool:
        """Returns whether a validation follows this batch, and is not the last one of the run."""
        return self.max_share is not None and not trainer.should_stop and validation_follows(trainer)

    def share_too_large(self, trainer: Trainer) -> float:
        """Returns validation's share of the time so far by the first device's clock, or 0 up to `max_share`."""
        share = trainer.strategy.broadcast(self.spent / (time.monotonic() - self.began))
        return share if share > self.max_share else 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the metrics to the device."""
        self.started = time.monotonic()
        self.rows: dict[str, tuple[Scores, Scores, Tensor]] = {}
        for score in self.metrics.values():
            score.to(pl_module.device)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Tensor, batch: dict, *_
    ) -> None:
        """Measures a batch of restored images and writes them into `folder/images/`."""
        sr, hr, names = eight_bits(outputs), batch["hr"], batch["name"]
        bicubic = eight_bits(enlarge(batch["lr"], hr.shape[-2:]))
        if not self.bicubic.keys() >= set(names):
            self.bicubic |= zip(names, self.measure(bicubic, hr), strict=True)
        for name, scores, *images in zip(names, self.measure(sr, hr), batch["lr"], bicubic, sr, hr, strict=True):
            self.rows[name] = scores, self.bicubic[name], validation_strip(*images).mul(255).round().byte()
        for name, image in zip(names, sr, strict=True):
            try:
                write_image(self.pictures / f"{name}.png", image)
            except OSError as error:
                log.warning("%s: not written (%s)", self.pictures / f"{name}.png", error.strerror)

    def measure(self, images: Tensor, hr: Tensor) -> list[Scores]:
        """Returns the scores of each image `(B, 3, H, W)`."""
        columns = [score.each(images, hr).tolist() for score in self.metrics.values()]
        return [dict(zip(self.metrics, row, strict=True)) for row in zip(*columns, strict=True)]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the means over the images of all devices, and the strips."""
        gathered = from_all_devices(trainer, self.rows)
        rows = sorted((name, row) for each in gathered for name, row in each.items())
        self.restored = {name: restored for name, (restored, _, _) in rows}
        self.bicubic = {name: bicubic for name, (_, bicubic, _) in rows}
        for writer in tensorboards(trainer):
            for name, (_, _, picture) in rows:
                writer.add_image(f"{self.tag}/{name}", picture, trainer.global_step - 1)  # the scores' step
        means = mean_scores(self.restored) | {f"{name}_bicubic": v for name, v in mean_scores(self.bicubic).items()}
        logged = {f"{self.tag}/{name}": value for name, value in means.items() if not math.isnan(value)}
        pl_module.log_dict(logged | {"val/seconds": time.monotonic() - self.started}, sync_dist=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds the time that this validation took, and leaves the device's memory to the training."""
        for score in self.metrics.values():
            score.to("cpu")
        self.spent += time.monotonic() - self.started


def eight_bits(images: Tensor) -> Tensor:
    """Returns images rounded as PNG files store them, so that scores are those of the written files."""
    return images.mul(255).round().div(255)


def mean_scores(images: dict[str, Scores]) -> Scores:
    """Returns the mean of each metric over images."""
    columns = {metric: [scores[metric] for scores in images.values()] for metric in next(iter(images.values()), {})}
    return {metric: math.fsum(values) / len(values) for metric, values in columns.items()}


def validation_strip(lr: Tensor, *images: Tensor) -> Tensor:
    """Returns the LR image `(3, h, w)` with enlarged pixels and images `(3, H, W)` side by side: `(3, H, n*W)`."""
    lr = F.interpolate(lr[None], size=images[0].shape[-2:], mode="nearest")[0]
    return torch.cat([lr, *images], dim=-1).cpu()


def tensorboards(trainer: Trainer) -> list[SummaryWriter]:
    """Returns the TensorBoard writers of a run; on devices other than the first there are none."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger.experiment, SummaryWriter)]
