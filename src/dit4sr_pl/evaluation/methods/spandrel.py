"""Feed-forward networks from their published weight files, through spandrel: Real-ESRGAN, SwinIR and others."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from torch import Tensor

from dit4sr_pl.common.hashing import file_hash
from dit4sr_pl.evaluation.benchmark_sets import SCALE
from dit4sr_pl.evaluation.methods import LRImage, same_size
from dit4sr_pl.evaluation.methods.ncnn_weights import read_esrgan

SUFFIXES = (".pth", ".ckpt", ".safetensors", ".bin")  # all of them are read without running code in them


class SpandrelNet:
    """The network that spandrel finds in a weight file.

    Args:
        label: name of the row; None: the architecture's name.
        weights: a `.pth`, `.ckpt` or `.safetensors` file, or ncnn's `.bin` with its `.param` next to it.
        tile: side of the tiles that larger LR images are cut into, pixels.
        margin: LR pixels around a tile that the network sees and that are cut off again.
        device: device of the network.
        batch_size: number of images of one size that pass the network at once.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: spandrel finds no network in it, or one that does not enlarge x4.
    """

    variant = ""

    def __init__(self, label: str | None, weights: str, tile: int, margin: int, device: str, batch_size: int = 1):
        self.net = load(Path(weights)).to(torch.device(device)).eval()
        self.tile, self.margin, self.device, self.batch_size = tile, margin, device, batch_size
        self.label = label or self.net.architecture.name
        self.weights_hash = file_hash(weights)
        self.network_config = {}
        self.identity = {"weights": self.weights_hash, "tile": tile, "margin": margin}

    def __call__(self, lr_images: Iterable[LRImage]) -> Iterator[tuple[str, Tensor]]:
        for names, lr, _ in same_size(lr_images, self.batch_size):
            yield from zip(names, in_tiles(self.net, lr.to(self.device), self.tile, self.margin), strict=True)


def load(path: Path):
    """Returns spandrel's descriptor of the network in a weight file."""
    import spandrel

    if not path.is_file():
        raise FileNotFoundError(f"weights={path}: no such file; docs/systems.md says where the published ones are")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"weights={path}: must end in {', '.join(SUFFIXES)}")
    loader = spandrel.ModelLoader()
    weights = read_esrgan(path) if path.suffix == ".bin" else None
    try:
        net = loader.load_from_file(path) if weights is None else loader.load_from_state_dict(weights)
    except spandrel.UnsupportedModelError:
        raise ValueError(
            f"weights={path}: no network that spandrel knows; take a published file (docs/systems.md)"
        ) from None
    except (UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"weights={path}: damaged or not weights ({str(error).splitlines()[0]}); download it again"
        ) from None
    if net.scale != SCALE or net.input_channels != 3:
        raise ValueError(f"weights={path}: a {net.architecture.name} that enlarges x{net.scale}; x{SCALE} is needed")
    return net


def in_tiles(net: Callable[[Tensor], Tensor], lr: Tensor, tile: int, margin: int) -> Tensor:
    """Runs `net` over tiles of `(B, 3, h, w)`, each with up to `margin` more pixels around it."""
    height, width = lr.shape[-2:]
    sr = lr.new_empty(len(lr), 3, SCALE * height, SCALE * width)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            above, before = min(margin, top), min(margin, left)
            seen = lr[..., top - above : top + tile + margin, left - before : left + tile + margin]
            piece = F.pad(net(seen), (-SCALE * before, 0, -SCALE * above, 0))  # negative: cuts off
            target = sr[..., SCALE * top : SCALE * (top + tile), SCALE * left : SCALE * (left + tile)]
            target.copy_(piece[..., : target.shape[-2], : target.shape[-1]])
    return sr
