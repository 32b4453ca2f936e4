"""Averaged weights, which are validated, saved and scored."""

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_avg_fn


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
        super().__init__(device, use_buffers, avg_fn=self.average)
        self.update_every_n_steps, self.first = update_every_n_steps, update_starting_at_step or 0
        self.ema, self.step = get_ema_avg_fn(decay), 0

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Returns whether the average changes after the optimizer step `step_idx`, counted from 0."""
        if step_idx is None:
            return False
        self.step = step_idx
        return step_idx <= self.first or step_idx % self.update_every_n_steps == 0

    def average(self, averaged: Tensor, current: Tensor, count: int | Tensor) -> Tensor:
        """Returns the new average of one weight."""
        return current.detach().clone() if self.step <= self.first else self.ema(averaged, current, count)
