"""The sizes that an LR image passes through until the network's grid fits it, and the way back."""

import torch
from torch import Tensor

from dit4sr_pl.images.files import bands
from dit4sr_pl.images.resize import LazyEnlargement

FITS = ("floor", "extend")

Size = tuple[int, int]


def working_sizes(lr: Size, size: Size, factor: int, fit: str, process_size: int | None) -> list[Size]:
    """Returns the sizes to which an LR image is resized, one after another, all by bicubic.

    Args:
        lr: height and width of the LR image.
        size: height and width of the result.
        factor: pixels per latent.
        fit: `floor`: the last size is reduced to multiples of `factor`, as in the release; `extend`: it stays.
        process_size: shortest side of an image that is restored, pixels; results that are smaller are restored at this
            size: their LR image is enlarged first, as in the release. None: no image is.

    Returns:
        The sizes. The last one is restored, and the result is resized from it to `size`.
    """
    sizes, exact = [], size
    if process_size is not None and min(lr) < (least := process_size * min(lr) // min(size)):
        grown = tuple(int(least / min(lr) * side) for side in lr)
        sizes.append(grown)
        exact = tuple(round(side * whole / small) for side, whole, small in zip(grown, size, lr, strict=True))
    sizes.append(exact)
    floored = tuple(max(factor, side // factor * factor) for side in exact)
    if fit == "floor" and floored != exact:
        sizes.append(floored)
    return sizes


def enlarge_through(lr: Tensor, sizes: list[Size], extent: Size | None = None) -> LazyEnlargement:
    """Returns LR images `(B, 3, h, w)` in 0..1 that are resized to one size after another, computed window by window.

    Args:
        lr: the LR images.
        sizes: see `working_sizes`.
        extent: see `LazyEnlargement`.
    """
    for size in sizes[:-1]:
        lr = LazyEnlargement(lr, size)
    return LazyEnlargement(lr, sizes[-1], extent)


def resize(images: Tensor, size: Size) -> Tensor:
    """Returns images `(B, 3, h, w)` in 0..1 at another size, by bicubic and band by band."""
    if tuple(images.shape[2:]) == size:
        return images
    resized = torch.empty(*images.shape[:2], *size, dtype=images.dtype, device=images.device)
    lazy = LazyEnlargement(images, size)
    for rows in bands(size[0]):
        resized[..., rows, :] = lazy[..., rows, :]
    return resized
