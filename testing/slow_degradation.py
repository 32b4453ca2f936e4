"""The degradation as a plain loop: one image, one kernel and one full 2-D convolution at a time.

Tests use it as their oracle and the benchmark as its baseline. NumPy and SciPy compute the kernels value by value from
the formulas, and every blur, including the 51x51 one of the sharpening, is `kornia.filters.filter2d` in two dimensions.
Resize, JPEG and noise are the package's own operations, which have tests of their own. So this module checks the
kernels, the blurs, the sharpening and the order of the steps.
"""

import math

import numpy as np
import torch
from kornia.filters import filter2d, get_gaussian_kernel2d
from scipy.special import j1
from torch import Tensor

from dit4sr_pl.degradation import Degradation, DrawnDegradation, ops
from dit4sr_pl.degradation.draws import DrawnBlur, DrawnNoise, DrawnSinc
from dit4sr_pl.degradation.jpeg import jpeg
from dit4sr_pl.degradation.kernels import KINDS


@torch.no_grad()
def degrade(degradation: Degradation, images: Tensor, params: DrawnDegradation) -> tuple[Tensor, Tensor]:
    """Returns what `degradation(images, params)` returns, computed for one image after the other."""
    pairs = [degrade_one(degradation, image[None], params[i]) for i, image in enumerate(images)]
    return torch.cat([lr for lr, _ in pairs]), torch.cat([hr for _, hr in pairs])


def degrade_one(degradation: Degradation, image: Tensor, drawn: DrawnDegradation) -> tuple[Tensor, Tensor]:
    """Returns the LR image and the target of one image `(1, 3, H, W)`."""
    height, width = image.shape[-2:]
    lr_size = (height // degradation.scale, width // degradation.scale)
    hr = image
    if degradation.sharpen is not None:
        settings = degradation.sharpen
        hr = sharpen(image, settings.kernel_size, settings.weight, settings.threshold)

    first, second, final = drawn.first, drawn.second, drawn.final
    lr = filter2d(hr, gaussian_family(first.blur)) if first.blur.on else hr
    lr = resize(lr, (height, width), float(first.resize.factor), int(first.resize.mode))
    lr = jpeg(add_noise(lr, first.noise), float(first.quality))

    lr = filter2d(lr, gaussian_family(second.blur)) if second.blur.on else lr
    lr = resize(lr, lr_size, float(second.resize.factor), int(second.resize.mode))
    lr = add_noise(lr, second.noise)

    if final.jpeg_first:
        lr = jpeg(lr, float(second.quality))
    lr = ops.resize(lr, lr_size, int(final.mode))
    if final.sinc.on:
        lr = filter2d(lr, sinc(final.sinc))
    if not final.jpeg_first:
        lr = jpeg(lr, float(second.quality))
    return (lr.clamp(0, 1) * 255).round() / 255, hr


def sharpen(image: Tensor, kernel_size: int, weight: float, threshold: float) -> Tensor:
    """Returns the image after unsharp masking; arguments are those of `ops.sharpen`."""
    sigma = 0.3 * ((kernel_size - 1) * 0.5 - 1) + 0.8
    kernel = get_gaussian_kernel2d((kernel_size, kernel_size), (sigma, sigma))
    residual = image - filter2d(image, kernel)
    mask = filter2d((residual.abs() > threshold / 255).float(), kernel)
    return mask * (image + weight * residual).clamp(0, 1) + (1 - mask) * image


def resize(image: Tensor, base: tuple[int, int], factor: float, mode: int) -> Tensor:
    """Resizes an image to `factor` times the size `base`."""
    return ops.resize(image, (max(1, int(base[0] * factor)), max(1, int(base[1] * factor))), mode)


def add_noise(image: Tensor, drawn: DrawnNoise) -> Tensor:
    """Adds the drawn noise."""
    if drawn.poisson:
        return ops.add_poisson_noise(image, float(drawn.poisson_scale), bool(drawn.grey), int(drawn.seed))
    return ops.add_gaussian_noise(image, float(drawn.sigma), bool(drawn.grey), int(drawn.seed))


def gaussian_family(drawn: DrawnBlur) -> Tensor:
    """Returns the kernel `(1, size, size)` of a drawn blur."""
    kind, half = KINDS[int(drawn.kind)], int(drawn.size) // 2
    if kind == "sinc":
        return sinc(drawn)
    angle, beta = float(drawn.angle), float(drawn.beta)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    inverse = np.linalg.inv(turn @ np.diag([float(drawn.sigma_x) ** 2, float(drawn.sigma_y) ** 2]) @ turn.T)
    kernel = np.empty((2 * half + 1, 2 * half + 1))
    for y in range(-half, half + 1):
        for x in range(-half, half + 1):
            power = (np.array([x, y]) @ inverse @ np.array([x, y])) ** beta
            kernel[y + half, x + half] = 1 / (power + 1) if kind.startswith("plateau") else math.exp(-0.5 * power)
    return normalised(kernel)


def sinc(drawn: DrawnSinc | DrawnBlur) -> Tensor:
    """Returns the sinc kernel `(1, size, size)` of a drawn filter."""
    half, cutoff = int(drawn.size) // 2, float(drawn.cutoff)
    kernel = np.empty((2 * half + 1, 2 * half + 1))
    for y in range(-half, half + 1):
        for x in range(-half, half + 1):
            r = math.hypot(x, y)
            kernel[y + half, x + half] = cutoff * j1(cutoff * r) / (2 * math.pi * r) if r else cutoff**2 / (4 * math.pi)
    return normalised(kernel)


def normalised(kernel: np.ndarray) -> Tensor:
    """Returns a kernel `(1, size, size)` with the sum 1."""
    return torch.from_numpy(kernel / kernel.sum()).float()[None]
