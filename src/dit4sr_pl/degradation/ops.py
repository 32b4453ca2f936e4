"""The operations of the degradation: pure functions of an image `(1, 3, H, W)` in 0..1 and of drawn parameters.

After the first random resize every image has a size of its own, and on a CPU even equal sizes are faster one by one,
within the cache, than stacked. So an operation takes one image, and nothing depends on the rest of the batch.
"""

import math

import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale
from kornia.filters import gaussian_blur2d
from torch import Tensor

MODES = ("area", "bilinear", "bicubic")


def sharpen(image: Tensor, kernel_size: int, weight: float, threshold: float) -> Tensor:
    """Returns the image after unsharp masking of what differs from its surroundings by more than `threshold`.

    The mask is blurred as the image is, for a soft transition.

    Args:
        image: `(1, 3, H, W)` in 0..1.
        kernel_size: side of the blur kernel, odd, pixels.
        weight: share of the difference that is added.
        threshold: smallest difference that is sharpened, in levels of 0..255.
    """
    # The reference turns the size into a sigma by OpenCV's rule: 8 pixels for 51.
    sigma = 0.3 * ((kernel_size - 1) * 0.5 - 1) + 0.8

    def smooth(x: Tensor) -> Tensor:
        return gaussian_blur2d(x, (kernel_size, kernel_size), (sigma, sigma))

    residual = image - smooth(image)
    mask = smooth((residual.abs() * 255 > threshold).to(image))
    return torch.lerp(image, (image + weight * residual).clamp(0, 1), mask)


def blur(image: Tensor, kernel: Tensor) -> Tensor:
    """Returns the image's correlation with `kernel`, `(K, K)` with K odd; the borders are reflected.

    It is computed as a product of spectra.
    """
    pad = kernel.shape[-1] // 2
    padded = F.pad(image, (pad, pad, pad, pad), mode="reflect")
    # Lengths with large prime factors are up to four times slower; the zeros added here wrap into the cropped part.
    lengths = [math.ceil(n / 32) * 32 for n in padded.shape[-2:]]
    spectrum = torch.fft.rfft2(padded, lengths) * torch.fft.rfft2(kernel, lengths).conj()
    return torch.fft.irfft2(spectrum, lengths)[..., : image.shape[-2], : image.shape[-1]]


def resize(image: Tensor, size: tuple[int, int], mode: int) -> Tensor:
    """Resizes an image by `MODES[mode]` without antialiasing, since aliasing is one of the wanted degradations.

    The whole image maps onto the whole result. The reference's scale factor would lose up to one pixel of the result
    at the right and the bottom, and shift the image relative to its ground truth.
    """
    return F.interpolate(image, size=size, mode=MODES[mode])


def add_gaussian_noise(image: Tensor, sigma: float, grey: bool, seed: int) -> Tensor:
    """Adds white noise and clamps to 0..1.

    Args:
        image: `(1, 3, H, W)` in 0..1.
        sigma: standard deviation, in levels of 0..255.
        grey: whether all colours share one field.
        seed: seed of the field.
    """
    noise = torch.randn(_noise_shape(image, grey), generator=_generator(image, seed), device=image.device)
    return (image + noise * (sigma / 255)).clamp(0, 1)


def add_poisson_noise(image: Tensor, scale: float, grey: bool, seed: int) -> Tensor:
    """Adds shot noise and clamps to 0..1.

    A value x of the 8-bit image becomes Poisson(x n) / n, where n is the number of the image's distinct values, rounded
    up to a power of two.

    Args:
        image: `(1, 3, H, W)` in 0..1.
        scale: factor of the noise.
        grey: whether the luma is counted instead of the colours.
        seed: seed of the field.
    """
    levels = ((rgb_to_grayscale(image) if grey else image).clamp(0, 1) * 255).round().long()
    distinct = int(torch.bincount(levels.flatten(), minlength=256).count_nonzero())
    peak = 2 ** math.ceil(math.log2(distinct))
    uniform = torch.rand(levels.shape, generator=_generator(image, seed), device=image.device, dtype=torch.float64)
    noise = poisson_counts(levels, uniform, peak) / peak - levels / 255
    return (image + noise.to(image) * scale).clamp(0, 1)


def poisson_counts(levels: Tensor, uniform: Tensor, peak: int) -> Tensor:
    """Returns the Poisson quantile of `uniform` at the rates `levels / 255 * peak`.

    `torch.poisson` consumes a varying number of random numbers: on a CPU one value that is rounded differently would
    change the noise of all pixels after it. Here every pixel has its own number.

    Args:
        levels: int64 values in 0..255.
        uniform: float64 values in 0..1, of the same shape.
        peak: the count at level 255.
    """
    rate = torch.arange(256, dtype=torch.float64, device=levels.device)[:, None] / 255 * peak
    counts = torch.arange(peak + math.ceil(10 * math.sqrt(peak)) + 10, dtype=torch.float64, device=levels.device)
    log_density = torch.xlogy(counts, rate) - rate - torch.lgamma(counts + 1)
    cumulative = log_density.exp().cumsum(dim=1).clamp(max=1)
    # All 256 distributions stand end to end, level k in k..k+1, so that one sorted list serves every pixel.
    quantiles = (cumulative + torch.arange(256, device=levels.device)[:, None]).flatten()
    return torch.searchsorted(quantiles, (levels + uniform).contiguous(), right=True) - levels * len(counts)


def to_8_bits(image: Tensor) -> Tensor:
    """Clamps to 0..1 and rounds to multiples of 1/255, as an image file does."""
    return (image.clamp(0, 1) * 255).round() / 255


def _noise_shape(image: Tensor, grey: bool) -> tuple[int, ...]:
    return (1, 1 if grey else 3, *image.shape[-2:])


def _generator(image: Tensor, seed: int) -> torch.Generator:
    return torch.Generator(image.device).manual_seed(seed)
