"""Histograms of how the training images were degraded."""

from collections import defaultdict

import torch
from lightning import Callback, LightningModule, Trainer

from dit4sr_pl.training.callbacks.validation_scores import tensorboards


class DegradationLog(Callback):
    """Logs histograms of the degradation's parameters, one value per image, every `trainer.log_every_n_steps`.

    Where gradients are accumulated, a histogram holds the images of all batches of a step.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts with the first step."""
        self.step = trainer.global_step
        self.values: dict[str, list[torch.Tensor]] = defaultdict(list)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: dict, batch_idx: int
    ) -> None:
        """Keeps a batch's values, and logs them at the end of a step under the step that its loss has."""
        if "degradation" in batch and (self.step + 1) % trainer.log_every_n_steps == 0:
            for name, values in batch["degradation"].scalars().items():
                self.values[name].append(values)
        if trainer.global_step == self.step:
            return  # gradients are still being accumulated
        for name, values in self.values.items():
            for writer in tensorboards(trainer):
                writer.add_histogram(f"degradation/{name}", torch.cat(values), self.step)
        self.step = trainer.global_step
        self.values.clear()
