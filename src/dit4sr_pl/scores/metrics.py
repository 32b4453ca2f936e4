"""Scores of restored images, through pyiqa."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from dit4sr_pl.common.precision import exact_float32
from dit4sr_pl.scores.pyiqa_loading import create, folders_score
from dit4sr_pl.scores.weight_files import Weights

log = logging.getLogger(__name__)


class SetScore(torch.nn.Module):
    """A score of a set of restored images against a set of reference images, through pyiqa: FID or KID.

    Args:
        name: pyiqa's name of the metric.
        reference: whether it needs ground truth, unless there is a `folder`.
        lower_is_better: True for distances.
        weights: arguments of `Weights`; where they are missing and may be, the score is nan.
        folder: reference images in place of the ground truth; None: the ground truth.
        options: pyiqa's own for the call, such as `distance_type`.
    """

    def __init__(
        self,
        name: str,
        reference: bool,
        lower_is_better: bool,
        weights: Mapping[str, Any],
        folder: str | None = None,
        **options: Any,
    ):
        super().__init__()
        self.name, self.reference, self.lower_is_better, self.folder = name, reference, lower_is_better, folder
        self.options, needed = options, Weights(**weights)
        self.score = create(name, needed) if needed.check(name) else None
        if self.score is None:
            log.warning("%s: no weights (%s); its score stays empty", name, needed.path(needed.missing()[0]))

    def forward(self, restored: Path, reference: Path) -> float:
        """Returns the score of a folder of images against another folder.

        Raises:
            ValueError: there are too few images for it.
        """
        if self.score is None:
            return float("nan")
        with exact_float32(next(self.score.parameters()).device):
            return folders_score(self.score, restored, reference, **self.options)


class ImageScore(Metric):
    """Mean over images of one pyiqa score. Sums are kept, so uneven batches and devices are reduced correctly.

    Args:
        name: pyiqa's name of the metric.
        reference: whether it needs ground truth.
        lower_is_better: True for distances.
        smallest_side: smallest side of the images that it takes, pixels.
        weights: arguments of `Weights`, if it needs weights that no package brings; where they are missing and may be,
            all scores are nan.
        arguments: pyiqa's own for this metric.
    """

    higher_is_better = None
    full_state_update = False

    def __init__(
        self,
        name: str,
        reference: bool,
        lower_is_better: bool,
        smallest_side: int = 1,
        weights: Mapping[str, Any] | None = None,
        **arguments: Any,
    ):
        super().__init__()
        self.name, self.reference, self.lower_is_better = name, reference, lower_is_better
        self.smallest_side = smallest_side
        needed = Weights(**weights) if weights is not None else None
        if needed is None or needed.check(name):
            self.score = create(name, needed, **arguments)
        else:
            self.score = None
            log.warning("%s: no weights (%s); its scores stay empty", name, needed.path(needed.missing()[0]))
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def each(self, sr: Tensor, hr: Tensor | None) -> Tensor:
        """Returns scores `(B,)` in float32, whatever autocast and the precision of matrix products are set to.

        Args:
            sr: restored images, `(B, 3, H, W)` in 0..1.
            hr: ground truth of the same shape; None for a metric without reference.

        Raises:
            ValueError: ground truth is missing, or images are too small.
        """
        if self.score is None:
            return torch.full((len(sr),), torch.nan, device=sr.device)
        if self.reference and hr is None:
            raise ValueError(f"{self.name} needs ground truth; give reference=FOLDER or metrics=no_reference")
        if min(sr.shape[-2:]) < self.smallest_side:
            raise ValueError(
                f"{self.name} needs images of {self.smallest_side} pixels a side, not {tuple(sr.shape)}; leave it out"
            )
        images = (sr.float(), hr.float()) if self.reference else (sr.float(),)
        with exact_float32(sr.device), torch.no_grad():
            return self.score(*images).flatten().float()  # NIQE computes in float64

    def update(self, sr: Tensor, hr: Tensor | None) -> None:
        """Adds the scores of a batch."""
        scores = self.each(sr, hr)
        self.total += scores.double().sum()
        self.count += len(scores)

    def compute(self) -> Tensor:
        """Returns the mean score of all images."""
        return (self.total / self.count).float()
