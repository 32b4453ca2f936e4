"""Colour alignment of a restored image to its enlarged LR image (paper Section 5.1, as in StableSR)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

WAVELET_LEVELS = 5


def adain(restored: Tensor, reference: Tensor) -> Tensor:
    """Gives every channel the reference's mean and standard deviation.

    Args:
        restored, reference: `(B, 3, H, W)` in 0..1.

    Returns:
        `(B, 3, H, W)`, not clamped.
    """
    mean, std = moments(restored)
    reference_mean, reference_std = moments(reference)
    scale = reference_std / std
    return torch.addcmul(reference_mean - mean * scale, restored, scale)


def wavelet(restored: Tensor, reference: Tensor) -> Tensor:
    """Keeps the restored image's detail and takes the reference's low frequencies; shapes as in `adain`."""
    aligned = torch.empty_like(restored, memory_format=torch.contiguous_format)
    channels = (images.flatten(0, 1).unsqueeze(1) for images in (aligned, restored, reference))
    for out, ours, theirs in zip(*channels, strict=True):  # one by one: one channel's worth of copies at a time
        torch.add(ours, low_frequencies(theirs - ours), out=out)
    return aligned


def none(restored: Tensor, reference: Tensor) -> Tensor:
    return restored


ALIGNMENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"adain": adain, "wavelet": wavelet, "none": none}


def moments(images: Tensor) -> tuple[Tensor, Tensor]:
    correction = int(images.shape[2:].numel() > 1)  # a single pixel varies by nothing
    variance, mean = torch.var_mean(images, dim=(2, 3), keepdim=True, correction=correction)
    return mean, (variance + 1e-5).sqrt()  # a flat channel has no variance to divide by


def low_frequencies(images: Tensor) -> Tensor:
    """À trous wavelet of one channel `(1, H, W)`: a 3x3 binomial blur, its taps 1, 2, 4, 8 and 16 pixels apart."""
    taps = torch.tensor([0.25, 0.5, 0.25], dtype=images.dtype, device=images.device)
    kernel = torch.outer(taps, taps)[None, None]
    for level in range(WAVELET_LEVELS):
        step = 2**level
        padded = F.pad(images, (step, step, step, step), mode="replicate")
        images = F.conv2d(padded, kernel, dilation=step)
    return images
