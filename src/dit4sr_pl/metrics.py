"""Scores of restored images, through pyiqa."""

import contextlib
import io
import logging
from importlib.resources import files

import torch
from torch import Tensor
from torchmetrics import Metric

# Y channel of ITU-R BT.601 and no border cropped: how StableSR and SeeSR score.
LUMA = {"test_y_channel": True, "color_space": "ycbcr"}
STLPIPS_WEIGHTS = files("stlpips_pytorch") / "weights" / "vST0.0" / "alex_shift_tolerant.pth"
ARGUMENTS = {"psnr": LUMA, "ssim": LUMA, "stlpips": {"pretrained_model_path": str(STLPIPS_WEIGHTS)}}


class ImageScore(Metric):
    """Mean over images of one pyiqa score; sums are kept, so that uneven batches and devices reduce rightly.

    Args:
        name: `psnr` (dB, higher is better), `ssim` (higher) or `stlpips` (lower).

    Raises:
        ValueError: for another name.
    """

    higher_is_better = None
    full_state_update = False

    def __init__(self, name: str):
        super().__init__()
        if name not in ARGUMENTS:
            raise ValueError(f"metric {name!r}; choose of {', '.join(ARGUMENTS)}")
        self.name = name
        self.score = create(name)
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, sr: Tensor, hr: Tensor) -> None:
        """Restored and ground truth images `(B, 3, H, W)` in 0..1."""
        scores = self.score(sr.float(), hr.float()).flatten()
        self.total += scores.sum().float()
        self.count += len(sr)

    def compute(self) -> Tensor:
        return self.total / self.count


def create(name: str) -> torch.nn.Module:
    """pyiqa's own metric on the CPU, from restored and ground truth images `(B, 3, H, W)` in 0..1 to `(B,)`."""
    import pyiqa
    from pyiqa.utils.logger import get_root_logger

    get_root_logger().setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):  # pyiqa prints the path of every weight file
        return pyiqa.create_metric(name, device="cpu", as_loss=False, **ARGUMENTS[name])
