"""Scores of restored images, through pyiqa."""

import contextlib
import functools
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pickle import UnpicklingError
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torchmetrics import Metric

from dit4sr_pl.metric_weights import Weights

log = logging.getLogger(__name__)

# pyiqa would download them; they come with packages that this project installs.
SHIPPED_WEIGHTS = {"stlpips": ("stlpips_pytorch", "weights/vST0.0/alex_shift_tolerant.pth")}


def shipped_weights(name: str) -> str | None:
    """Returns the path of a metric's weights in an installed package, None if no package brings them."""
    if name not in SHIPPED_WEIGHTS:
        return None
    package, path = SHIPPED_WEIGHTS[name]
    return str(files(package) / path)


class ImageScore(Metric):
    """Mean over images of one pyiqa score; sums are kept, so that uneven batches and devices reduce rightly.

    Args:
        name: pyiqa's. arguments: pyiqa's own, for this metric.
        reference: whether it needs ground truth.
        lower_is_better: as for distances.
        smallest_side: of the images it takes, in pixels.
        weights: the arguments of `Weights`, if it needs weights that no package brings. Where they are missing and
            may be, all scores are nan.
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
        """Scores `(B,)` of restored images against ground truth, both `(B, 3, H, W)` in 0..1.

        In float32, whatever autocast and the precision of matrix products are set to.

        Raises:
            ValueError: no ground truth where it is needed, or images that are too small.
        """
        if self.score is None:
            return torch.full((len(sr),), torch.nan, device=sr.device)
        if self.reference and hr is None:
            raise ValueError(f"{self.name} needs ground truth; give reference=FOLDER or metrics=no_reference")
        if min(sr.shape[-2:]) < self.smallest_side:
            raise ValueError(f"{self.name} needs images of {self.smallest_side} pixels a side, not {tuple(sr.shape)}")
        images = (sr.float(), hr.float()) if self.reference else (sr.float(),)
        with exactly(sr.device):
            return self.score(*images).flatten()

    def update(self, sr: Tensor, hr: Tensor | None) -> None:
        scores = self.each(sr, hr)
        self.total += scores.double().sum()
        self.count += len(scores)

    def compute(self) -> Tensor:
        return (self.total / self.count).float()


@contextlib.contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TensorFloat-32 in matrix products, which training turns on."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False), torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def create(name: str, weights: Weights | None = None, **arguments: Any) -> torch.nn.Module:
    """pyiqa's own metric on the CPU, from restored and ground truth images `(B, 3, H, W)` in 0..1 to `(B,)`.

    Raises:
        ValueError: a weight file that cannot be read, or is another metric's; or pyiqa cannot import its CLIP.
    """
    import pyiqa
    from pyiqa.utils.logger import get_root_logger

    get_root_logger().setLevel(logging.WARNING)
    if name in SHIPPED_WEIGHTS:
        arguments["pretrained_model_path"] = shipped_weights(name)
    opened: list[str] = []
    try:
        with quietly(), torch.no_grad(), reading_from(name, weights, opened):
            metric = pyiqa.create_metric(name, device="cpu", as_loss=False, **arguments)
    except ModuleNotFoundError as error:
        if error.name != "pkg_resources":
            raise
        raise ValueError(f"{name}: CLIP needs pkg_resources; run pip install 'setuptools<81'") from None
    except (RuntimeError, UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{', '.join(opened) or name}: truncated or not what {name} needs ({reason}); delete and get it again"
        ) from None
    if isinstance(clip := getattr(metric.net, "clip_model", None), list):
        metric.clip = clip[0]  # pyiqa hides it in a list, where it does not follow to another device
    return metric


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """pyiqa prints the path of every weight file, and reads CLIP in a format that PyTorch is about to leave."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", FutureWarning)
        yield


@contextlib.contextmanager
def reading_from(name: str, weights: Weights | None, opened: list[str]) -> Iterator[None]:
    """All doors by which pyiqa gets weights lead to files that are there: no hub, no cache, no pickled code.

    It has no switches for that. `opened` collects what it reads.
    """
    import torchvision.models._api as torchvision_api
    from pyiqa.archs import arch_util, clip_model

    def path(url: str, *_: Any, **__: Any) -> str:
        if weights is None:
            raise RuntimeError(f"its config does not name {url}")
        opened.append(str(weights.path(url)))
        return opened[-1]

    def read(url: str, *_: Any, **__: Any) -> dict[str, Tensor]:
        return torch.load(path(url), map_location="cpu", weights_only=True)

    with contextlib.ExitStack() as doors:
        enter = doors.enter_context
        enter(mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"))
        enter(mock.patch.object(arch_util, "load_file_from_url", path))
        enter(mock.patch.object(clip_model, "_download", path))
        enter(mock.patch.object(torchvision_api, "load_state_dict_from_url", read))
        if name.startswith("maniqa"):
            import timm

            # Its file has the backbone's weights too.
            backbone = functools.partial(timm.create_model, "vit_base_patch8_224")
            enter(mock.patch.object(timm, "create_model", lambda *_, **__: backbone(pretrained=False)))
        if name.startswith("liqe"):
            from pyiqa.archs import liqe_arch

            # It keeps text features by a name that says nothing of the weights they come from.
            enter(mock.patch.object(liqe_arch, "DEFAULT_CACHE_DIR", enter(tempfile.TemporaryDirectory())))
        yield
