"""Colour alignment of a restored image to its enlarged LR image (paper Section 5.1, as in StableSR)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dit4sr_pl.images.files import bands

WAVELET_LEVELS = 5
MARGIN = 2**WAVELET_LEVELS - 1  # rows above and below a pixel that its low frequencies depend on


def adain(restored: Tensor, reference: Tensor) -> Tensor:
    """Gives every channel the reference's mean and standard deviation.

    Args:
        restored: `(B, 3, H, W)` in 0..1; overwritten by the result.
        reference: images of the same shape: a tensor, or an object that returns one for `reference[..., rows, :]`.

    Returns:
        `(B, 3, H, W)`, not clamped.
    """
    (mean, std), (reference_mean, reference_std) = moments(restored), moments(reference)
    scale = reference_std / std
    return restored.mul_(scale.float()).add_((reference_mean - mean * scale).float())


def wavelet(restored: Tensor, reference: Tensor) -> Tensor:
    """Keeps the restored image's detail and takes the reference's low frequencies; arguments are those of `adain`."""
    height, above = restored.shape[2], restored[..., :0, :]
    for rows in bands(height):
        wanted = slice(rows.start - above.shape[2], min(rows.stop + MARGIN, height))
        ours = torch.cat([above, restored[..., rows.start : wanted.stop, :]], dim=2)  # as it was
        low = low_frequencies(reference[..., wanted, :] - ours)
        inside = slice(rows.start - wanted.start, rows.stop - wanted.start)
        restored[..., rows, :] += low[..., inside, :]
        above = ours[..., max(inside.stop - MARGIN, 0) : inside.stop, :]
    return restored


def none(restored: Tensor, reference: Tensor) -> Tensor:
    """Returns the restored image unchanged."""
    return restored


ALIGNMENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"adain": adain, "wavelet": wavelet, "none": none}


def moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation `(B, 3, 1, 1)`, in float64 where the device has it."""
    total, squares, count = 0, 0, images.shape[2:].numel()
    for rows in bands(images.shape[2]):
        band = images[..., rows, :]
        band = band.float() if band.device.type == "mps" else band.double()  # Apple's GPUs have no float64
        total = total + band.sum((2, 3), keepdim=True)
        squares = squares + band.square().sum((2, 3), keepdim=True)
    mean = total / count
    variance = (squares - total * mean) / max(count - 1, 1)  # a single pixel varies by nothing
    return mean, (variance.clamp(min=0) + 1e-5).sqrt()  # a flat channel has no variance to divide by


def low_frequencies(images: Tensor) -> Tensor:
    """Returns the à trous wavelet's low frequencies of `(B, 3, H, W)`: 3x3 binomial blurs of steps 1, 2, 4, 8 and 16
    pixels.
    """
    taps = torch.tensor([0.25, 0.5, 0.25], dtype=images.dtype, device=images.device)
    kernel = torch.outer(taps, taps).expand(3, 1, 3, 3)
    for level in range(WAVELET_LEVELS):
        step = 2**level
        padded = F.pad(images, (step, step, step, step), mode="replicate")
        images = F.conv2d(padded, kernel, dilation=step, groups=3)
    return images
