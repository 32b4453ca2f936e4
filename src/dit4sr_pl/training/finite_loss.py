"""A check for infinite losses that never waits for the step that runs."""

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
