"""Colour alignment of a restored image to its enlarged LR image (paper Section 5.1, as in StableSR)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dit4sr_pl.images.files import bands
from dit4sr_pl.images.resize import LazyEnlargement

GREY_SPREAD = 3 / 255  # by which the channels of a pixel without colour differ at most
COLORS = ("adain", "wavelet", "wavelet_adain", "none")


def align(restored: Tensor, reference: Tensor, color: str, levels: int) -> Tensor:
    """Aligns a restored image's colours.

    Args:
        restored: `(B, 3, H, W)` in 0..1; overwritten by the result.
        reference: images of the same shape: a tensor, or an object that returns one for `reference[..., rows, :]`.
        color: one of `COLORS`: `adain`, `wavelet`, `wavelet_adain` (first `wavelet`, then `adain`), or `none`, which
            changes nothing.
        levels: levels of `wavelet`, 1 to 8.

    Returns:
        `(B, 3, H, W)`, not clamped.
    """
    if "wavelet" in color:
        restored = wavelet(restored, reference, levels)
    if "adain" in color:
        restored = adain(restored, reference)
    return restored


def adain(restored: Tensor, reference: Tensor) -> Tensor:
    """Gives every channel the reference's mean and standard deviation; arguments are those of `align`."""
    (mean, std), (reference_mean, reference_std) = moments(restored), moments(reference)
    scale = reference_std / std
    return restored.mul_(scale.float()).add_((reference_mean - mean * scale).float())


def wavelet(restored: Tensor, reference: Tensor, levels: int) -> Tensor:
    """Keeps the restored image's detail and takes the reference's low frequencies; arguments are those of `align`."""
    margin = 2**levels - 1  # rows above and below a pixel that its low frequencies depend on
    height, above = restored.shape[2], restored[..., :0, :]
    for rows in bands(height):
        wanted = slice(rows.start - above.shape[2], min(rows.stop + margin, height))
        ours = torch.cat([above, restored[..., rows.start : wanted.stop, :]], dim=2)  # as it was
        low = low_frequencies(reference[..., wanted, :] - ours, levels)
        inside = slice(rows.start - wanted.start, rows.stop - wanted.start)
        restored[..., rows, :] += low[..., inside, :]
        above = ours[..., max(inside.stop - margin, 0) : inside.stop, :]
    return restored


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


def low_frequencies(images: Tensor, levels: int) -> Tensor:
    """Returns the à trous wavelet's low frequencies of `(B, 3, H, W)`: 3x3 binomial blurs of steps 1, 2, 4 ... pixels,
    `levels` of them.
    """
    taps = torch.tensor([0.25, 0.5, 0.25], dtype=images.dtype, device=images.device)
    kernel = torch.outer(taps, taps).expand(3, 1, 3, 3)
    for level in range(levels):
        step = 2**level
        padded = F.pad(images, (step, step, step, step), mode="replicate")
        images = F.conv2d(padded, kernel, dilation=step, groups=3)
    return images


def is_colorless(image: Tensor) -> bool:
    """Returns whether no pixel of an image `(C, H, W)` in 0..1 has colour: a grey scan, say, that was saved as RGB."""
    return all(bool((_spread(image[:, rows]) <= GREY_SPREAD + 1e-6).all()) for rows in bands(image.shape[1]))


def keep_colorless(sr: Tensor, lr: Tensor) -> Tensor:
    """Gives restored images whose LR images have no colour the tint of these, which is mostly none.

    Args:
        sr: `(B, 3, H, W)` in 0..1; overwritten by the result.
        lr: their LR images `(B, 3, h, w)`.
    """
    for image, low in zip(sr, lr, strict=True):
        if not is_colorless(low):
            continue
        tinted, size = bool(_spread(low).any()), tuple(image.shape[1:])
        for rows in bands(size[0]):
            band = image[:, rows]
            grey = band.mean(0, keepdim=True).expand_as(band)
            if tinted:
                enlarged = LazyEnlargement(low[None], size)[..., rows, :][0].to(band)
                grey = (grey + enlarged - enlarged.mean(0)).clamp(0, 1)
            band.copy_(grey)
    return sr


def _spread(image: Tensor) -> Tensor:
    return image.amax(0) - image.amin(0)
