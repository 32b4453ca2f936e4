"""The blur kernels of Real-ESRGAN (Wang et al. 2021, Sections 3.2 and 3.4): six Gaussian families and sinc.

All functions are vectorised over the batch. A parameter is a tensor `(B,)`, kernels are `(B, canvas, canvas)`, sum
to 1 and are zero beyond their own odd size, so that kernels of several sizes share one canvas.
"""

import math

import torch
from torch import Tensor

KINDS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso", "sinc")
ISOTROPIC = torch.tensor([kind.endswith("_iso") or kind == "iso" for kind in KINDS])
GENERALIZED = torch.tensor([kind.startswith("generalized") for kind in KINDS])
PLATEAU = torch.tensor([kind.startswith("plateau") for kind in KINDS])
SINC = KINDS.index("sinc")


def blur_kernels(
    kind: Tensor,
    size: Tensor,
    sigma_x: Tensor,
    sigma_y: Tensor,
    angle: Tensor,
    beta: Tensor,
    cutoff: Tensor,
    canvas: int,
) -> Tensor:
    """Kernels `(B, canvas, canvas)`, each of the family `KINDS[kind]` and of its own odd `size` in pixels.

    `sigma_x`, `sigma_y` are in pixels, `angle` and `cutoff` in radians (per pixel). The Gaussian families read the
    sigmas, the angle and `beta` (1 for a plain Gaussian); sinc reads `cutoff`.
    """
    distance = mahalanobis(sigma_x, sigma_y, angle, canvas)
    beta = beta[:, None, None]
    kernel = torch.where(PLATEAU[kind][:, None, None], plateau(distance, beta), generalized(distance, beta))
    kernel = torch.where((kind == SINC)[:, None, None], low_pass(cutoff, canvas), kernel)
    return _fit(kernel, size)


def sinc_kernels(size: Tensor, cutoff: Tensor, canvas: int) -> Tensor:
    """Sinc kernels `(B, canvas, canvas)` of the given odd sizes in pixels and cut-offs in radians per pixel."""
    return _fit(low_pass(cutoff, canvas), size)


def mahalanobis(sigma_x: Tensor, sigma_y: Tensor, angle: Tensor, canvas: int) -> Tensor:
    """Squared distance `x^T S^-1 x` from the centre, `S = R(angle) diag(sigma_x^2, sigma_y^2) R(angle)^T`."""
    y, x = _grid(canvas)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    along, across = cos * x + sin * y, cos * y - sin * x
    return (along / sigma_x[:, None, None]).square() + (across / sigma_y[:, None, None]).square()


def generalized(distance: Tensor, beta: Tensor) -> Tensor:
    """Generalised Gaussian `exp(-d^beta / 2)`, not normalised; the plain Gaussian at `beta = 1`."""
    return torch.exp(-0.5 * distance.pow(beta))


def plateau(distance: Tensor, beta: Tensor) -> Tensor:
    """Plateau-shaped `1 / (1 + d^beta)`, not normalised."""
    return 1 / (1 + distance.pow(beta))


def low_pass(cutoff: Tensor, canvas: int) -> Tensor:
    """The 2-D sinc filter `w J1(w r) / (2 pi r)` of cut-off `w`, its limit `w^2 / (4 pi)` at the centre."""
    y, x = _grid(canvas)
    radius = torch.hypot(x, y)
    cutoff = cutoff[:, None, None]
    ring = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    return torch.where(radius == 0, cutoff.square() / (4 * math.pi), ring)


def _fit(kernel: Tensor, size: Tensor) -> Tensor:
    """Cut each kernel to its own size and normalise what is left."""
    y, x = _grid(kernel.shape[-1])
    inside = torch.maximum(x.abs(), y.abs()) <= (size // 2)[:, None, None]
    kernel = torch.where(inside, kernel, 0)
    return kernel / kernel.sum(dim=(1, 2), keepdim=True)


def _grid(canvas: int) -> tuple[Tensor, Tensor]:
    """Rows and columns `(canvas, canvas)`, 0 at the centre."""
    steps = torch.arange(canvas, dtype=torch.float64) - canvas // 2
    return torch.meshgrid(steps, steps, indexing="ij")
