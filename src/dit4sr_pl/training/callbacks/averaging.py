"""Averaged weights, which are validated, saved and scored."""

from functools import partial

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dit4sr_pl.training.lightning_state import averaged_model


class EMAWeightAveraging(WeightAveraging):
    """An exponential moving average of the weights.

    Until averaging begins, the average is the trained weights themselves. Lightning's callback of this name keeps the
    weights of the start until then, so that an untrained network would be validated and saved.

    Args:
        decay: share of the old average in the new one, between 0 and 1.
        update_every_n_steps: interval in optimizer steps.
        update_starting_at_step: the step, counted from 0, after which averaging begins; None: with the first.
        device: where the average is kept; None: the training device.
        use_buffers: whether buffers are averaged, too.
    """

    def __init__(
        self,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        device: torch.device | str | None = None,
        use_buffers: bool = True,
    ):
        super().__init__(device, use_buffers)
        self.decay, self.use_buffers = decay, use_buffers
        self.update_every_n_steps, self.first = update_every_n_steps, update_starting_at_step or 0
        self.step = 0

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Returns whether the average changes after the optimizer step `step_idx`, counted from 0."""
        if step_idx is None:
            return False
        self.step = step_idx
        return step_idx <= self.first or step_idx % self.update_every_n_steps == 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes the average, which this class updates in one pass over all weights.

        PyTorch's own update asks the device at every step how often it was called, and the host waits for the answer.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            model = averaged_model(self)
            model.n_averaged = model.n_averaged.cpu()
            model.update_parameters = partial(self.update, model)

    @torch.no_grad()
    def update(self, averaged: AveragedModel, current: nn.Module) -> None:
        """Updates the average after a step."""
        tensors = [list(module.parameters()) for module in (averaged.module, current)]
        buffers = [list(module.buffers()) for module in (averaged.module, current)]
        if self.use_buffers:
            tensors = [parameters + more for parameters, more in zip(tensors, buffers, strict=True)]
        elif buffers[0]:
            torch._foreach_copy_(*buffers)
        if self.step <= self.first:
            torch._foreach_copy_(*tensors)
        else:
            torch._foreach_lerp_(*tensors, 1 - self.decay)
        averaged.n_averaged += 1
