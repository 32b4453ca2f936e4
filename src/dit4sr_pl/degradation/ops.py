"""The operations of the degradation, pure functions of an image `(1, 3, H, W)` in 0..1 and of drawn parameters.

Images have sizes of their own after the first random resize, and on a CPU even equal ones are faster one by one,
within the cache, than stacked: so an operation takes one image, and nothing depends on the rest of the batch.
"""

import math

import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale
from kornia.filters import gaussian_blur2d
from torch import Tensor

MODES = ("area", "bilinear", "bicubic")


def sharpen(image: Tensor, kernel_size: int, weight: float, threshold: float) -> Tensor:
    """Unsharp masking of what stands out from its surroundings by more than `threshold` (of 255), in 0..1.

    The mask is blurred as the image is, for a soft transition. `kernel_size` is odd, in pixels.
    """
    # OpenCV's rule, by which the reference turns the size into a sigma: 8 pixels for 51.
    sigma = 0.3 * ((kernel_size - 1) * 0.5 - 1) + 0.8

    def smooth(x: Tensor) -> Tensor:
        return gaussian_blur2d(x, (kernel_size, kernel_size), (sigma, sigma))

    residual = image - smooth(image)
    mask = smooth((residual.abs() * 255 > threshold).to(image))
    return torch.lerp(image, (image + weight * residual).clamp(0, 1), mask)


def blur(image: Tensor, kernel: Tensor) -> Tensor:
    """Correlation with `kernel` `(K, K)`, K odd, borders reflected; a product of spectra."""
    pad = kernel.shape[-1] // 2
    padded = F.pad(image, (pad, pad, pad, pad), mode="reflect")
    # Lengths with large prime factors are up to four times slower; the zeros added here wrap into the cropped part.
    lengths = [math.ceil(n / 32) * 32 for n in padded.shape[-2:]]
    spectrum = torch.fft.rfft2(padded, lengths) * torch.fft.rfft2(kernel, lengths).conj()
    return torch.fft.irfft2(spectrum, lengths)[..., : image.shape[-2], : image.shape[-1]]


def resize(image: Tensor, size: tuple[int, int], mode: int) -> Tensor:
    """Resize to `size` by `MODES[mode]`, without antialiasing: aliasing is one of the degradations wanted.

    The whole picture maps onto the whole result, where the reference's scale factor would lose up to one pixel of
    the result at the right and the bottom, and shift the image against its ground truth.
    """
    return F.interpolate(image, size=size, mode=MODES[mode])


def add_gaussian_noise(image: Tensor, sigma: float, grey: bool, seed: int) -> Tensor:
    """White noise of standard deviation `sigma` (of 255), one field for all colours if `grey`; clamped to 0..1."""
    noise = torch.randn(_noise_shape(image, grey), generator=_generator(image, seed), device=image.device)
    return (image + noise * (sigma / 255)).clamp(0, 1)


def add_poisson_noise(image: Tensor, scale: float, grey: bool, seed: int) -> Tensor:
    """Shot noise times `scale`, of the luma if `grey`; clamped to 0..1.

    A value x of the 8-bit image is counted as Poisson(x n) / n, where n is the number of its distinct values, rounded
    up to a power of two.
    """
    levels = ((rgb_to_grayscale(image) if grey else image).clamp(0, 1) * 255).round().long()
    distinct = int(torch.bincount(levels.flatten(), minlength=256).count_nonzero())
    peak = 2 ** math.ceil(math.log2(distinct))
    uniform = torch.rand(levels.shape, generator=_generator(image, seed), device=image.device, dtype=torch.float64)
    noise = poisson_counts(levels, uniform, peak) / peak - levels / 255
    return (image + noise.to(image) * scale).clamp(0, 1)


def poisson_counts(levels: Tensor, uniform: Tensor, peak: int) -> Tensor:
    """The Poisson quantile of `uniform` (float64, 0..1) at the rates `levels / 255 * peak`; `levels` are 0..255.

    torch.poisson takes as many random numbers as it happens to need, so that on a CPU one value rounded differently
    would change the noise of all pixels after it. Here every pixel has its own.
    """
    rate = torch.arange(256, dtype=torch.float64, device=levels.device)[:, None] / 255 * peak
    counts = torch.arange(peak + math.ceil(10 * math.sqrt(peak)) + 10, dtype=torch.float64, device=levels.device)
    log_density = torch.xlogy(counts, rate) - rate - torch.lgamma(counts + 1)
    cumulative = log_density.exp().cumsum(dim=1).clamp(max=1)
    # All 256 distributions end to end, level k in k..k+1: one sorted list serves every pixel.
    ladder = (cumulative + torch.arange(256, device=levels.device)[:, None]).flatten()
    return torch.searchsorted(ladder, (levels + uniform).contiguous(), right=True) - levels * len(counts)


def to_8_bits(image: Tensor) -> Tensor:
    """Clamp to 0..1 and round to multiples of 1/255, as an image file does."""
    return (image.clamp(0, 1) * 255).round() / 255


def _noise_shape(image: Tensor, grey: bool) -> tuple[int, ...]:
    return (1, 1 if grey else 3, *image.shape[-2:])


def _generator(image: Tensor, seed: int) -> torch.Generator:
    return torch.Generator(image.device).manual_seed(seed)
