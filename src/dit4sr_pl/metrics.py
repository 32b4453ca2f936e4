"""Scores of restored images, through pyiqa."""

import contextlib
import io
import logging
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

# pyiqa would download them; they come with a package that this project installs.
SHIPPED_WEIGHTS = {"stlpips": str(files("stlpips_pytorch") / "weights" / "vST0.0" / "alex_shift_tolerant.pth")}


class ImageScore(Metric):
    """Mean over images of one pyiqa score; sums are kept, so that uneven batches and devices reduce rightly.

    Args:
        name: pyiqa's. arguments: pyiqa's own, for this metric.
    """

    higher_is_better = None
    full_state_update = False

    def __init__(self, name: str, **arguments: Any):
        super().__init__()
        self.name = name
        self.score = create(name, **arguments)
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    @torch.no_grad()
    def each(self, sr: Tensor, hr: Tensor | None) -> Tensor:
        """Scores `(B,)` of restored images against ground truth, both `(B, 3, H, W)` in 0..1."""
        return self.score(sr.float(), hr.float()).flatten()

    def update(self, sr: Tensor, hr: Tensor | None) -> None:
        scores = self.each(sr, hr)
        self.total += scores.sum().float()
        self.count += len(scores)

    def compute(self) -> Tensor:
        return self.total / self.count


def create(name: str, **arguments: Any) -> torch.nn.Module:
    """pyiqa's own metric on the CPU, from restored and ground truth images `(B, 3, H, W)` in 0..1 to `(B,)`."""
    import pyiqa
    from pyiqa.utils.logger import get_root_logger

    get_root_logger().setLevel(logging.WARNING)
    if name in SHIPPED_WEIGHTS:
        arguments["pretrained_model_path"] = SHIPPED_WEIGHTS[name]
    with contextlib.redirect_stdout(io.StringIO()):  # pyiqa prints the path of every weight file
        return pyiqa.create_metric(name, device="cpu", as_loss=False, **arguments)
