"""Makes pyiqa's metrics from weight files on this machine. This module holds everything that patches pyiqa."""

import contextlib
import functools
import io
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from dit4sr_pl.scores.weight_files import Weights

# pyiqa would download them; they come with a package that this project installs.
FOLDER = files("stlpips_pytorch") / "weights" / "vST0.0"
SHIPPED_WEIGHTS = {
    "stlpips": str(FOLDER / "alex_shift_tolerant.pth"),
    "stlpips-vgg": str(FOLDER / "vgg_shift_tolerant.pth"),
}


def create(name: str, weights: Weights | None = None, as_loss: bool = False, **arguments: Any) -> torch.nn.Module:
    """Returns pyiqa's own metric on the CPU: a module from restored and ground-truth images `(B, 3, H, W)` to scores
    `(B,)`.

    Args:
        name: pyiqa's name of the metric.
        weights: weight files that the metric needs; None: no package-external files.
        as_loss: whether the result is the mean score of a batch, through which gradients pass.
        arguments: pyiqa's own for this metric.

    Raises:
        ValueError: a weight file cannot be read or belongs to another metric, or pyiqa cannot import its CLIP.
    """
    try:
        import pyiqa
    except ModuleNotFoundError as error:
        if error.name != "pyiqa":
            raise
        raise ValueError(f"metrics={name}: needs pyiqa, which is not installed; run pip install pyiqa") from None
    from pyiqa.utils.logger import get_root_logger

    get_root_logger().setLevel(logging.WARNING)
    if name in SHIPPED_WEIGHTS:
        arguments["pretrained_model_path"] = SHIPPED_WEIGHTS[name]
    opened: list[str] = []
    try:
        with quietly(), torch.no_grad(), reading_from(name, weights, opened):
            metric = pyiqa.create_metric(name, device="cpu", as_loss=as_loss, **arguments)
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
        metric.clip = clip[0]  # pyiqa keeps it in a list, where it would not move to another device
    return metric


def folders_score(metric: torch.nn.Module, restored: Path, reference: Path, **options: Any) -> float:
    """Returns pyiqa's score of a folder of images against another folder; KID's subsets are the same in every call.

    Raises:
        ValueError: there are too few images for it.
    """
    before = np.random.get_state()
    np.random.seed(0)  # pyiqa draws from NumPy's global generator
    try:
        with quietly(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SciPy's, of its square root of a matrix
            score = float(metric(str(restored), str(reference), num_workers=0, verbose=False, **options))
    except ValueError as error:  # an imaginary part of the root
        score, reason = math.nan, str(error)
    else:
        reason = "it is not a number"
    finally:
        np.random.set_state(before)
    if not math.isfinite(score):
        numbers = [len(list(folder.iterdir())) for folder in (restored, reference)]
        raise ValueError(f"no distance between sets of {numbers[0]} and {numbers[1]} images ({reason}); give more")
    return score


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Hides pyiqa's output, and warnings about its own use of PyTorch and torchvision."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", ".*(parameter 'pretrained'|weight enum)", UserWarning)  # torchvision's
        yield


@contextlib.contextmanager
def reading_from(name: str, weights: Weights | None, opened: list[str]) -> Iterator[None]:
    """Makes pyiqa read weights from given files only: no hub, no cache, no pickled code.

    pyiqa has no options for that. `opened` collects the paths that it reads.
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

    with contextlib.ExitStack() as patches:
        enter = patches.enter_context
        enter(mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"))
        enter(mock.patch.object(arch_util, "load_file_from_url", path))
        enter(mock.patch.object(clip_model, "_download", path))
        enter(mock.patch.object(torchvision_api, "load_state_dict_from_url", read))
        if name.startswith("maniqa"):
            import timm

            # MANIQA's file holds the weights of its vision transformer too.
            backbone = functools.partial(timm.create_model, "vit_base_patch8_224")
            enter(mock.patch.object(timm, "create_model", lambda *_, **__: backbone(pretrained=False)))
        if name.startswith("niqe"):
            from pyiqa.archs import niqe_arch

            enter(mock.patch.object(niqe_arch, "load_file_from_url", path))
        if name.startswith("liqe"):
            from pyiqa.archs import liqe_arch

            # LIQE caches text features under a name that does not depend on the weights they come from.
            enter(mock.patch.object(liqe_arch, "DEFAULT_CACHE_DIR", enter(tempfile.TemporaryDirectory())))
        yield
