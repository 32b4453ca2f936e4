"""The loss of every batch is checked and averaged without waiting for the step that runs."""

import math

import torch
from torch import Tensor


class FiniteLoss:
    """Checks every loss when the next one comes; by then its copy to the CPU has long arrived."""

    def __init__(self):
        self.step, self.loss, self.copied = 0, None, None

    def add(self, loss: Tensor, step: int) -> None:
        """Checks the loss before this one, and begins to copy this one.

        Args:
            loss: a single value, on any device.
            step: its number, for the error.

        Raises:
            ValueError: the loss before this one is nan or infinite.
        """
        self.check()
        self.step, self.loss, self.copied = step, loss.detach().to("cpu", non_blocking=True), None
        if loss.device.type == "cuda":
            self.copied = torch.cuda.Event()
            self.copied.record()

    def check(self) -> None:
        """Raises ValueError, with its step, if the last loss is nan or infinite."""
        if self.loss is None:
            return
        if self.copied is not None:
            self.copied.synchronize()
        value, self.loss = self.loss.item(), None
        if not math.isfinite(value):
            raise ValueError(
                f"loss is {value} at step {self.step}; lower optimizer.lr or resume from an earlier checkpoint "
                "(ckpt_path=...)"
            )


class StepLoss:
    """The mean loss of the batches of one optimizer step; only the last batch of a step completes it."""

    def __init__(self):
        self.step, self.losses = -1, []

    def add(self, loss: Tensor, step: int) -> Tensor:
        """Returns the mean over the batches of a step so far.

        Args:
            loss: that of a batch, a single value.
            step: number of the optimizer step that the batch belongs to.
        """
        if step != self.step:
            self.step, self.losses = step, []
        self.losses.append(loss.detach())
        return torch.stack(self.losses).mean() if len(self.losses) > 1 else self.losses[0]
