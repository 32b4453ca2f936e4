"""The blur kernels of Real-ESRGAN (Wang et al. 2021, Sections 3.2 and 3.4): six Gaussian families and sinc.

All functions are vectorised over the batch. A parameter is a tensor `(B,)`. Kernels are `(B, canvas, canvas)`, sum to
1 and are zero beyond their own odd size, so that kernels of several sizes share one canvas.
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
    """Returns kernels `(B, canvas, canvas)`.

    Args:
        kind: index of each kernel's family in `KINDS`.
        size: each kernel's own odd size in pixels.
        sigma_x: standard deviation along the first axis, pixels; read by the Gaussian families.
        sigma_y: standard deviation along the second axis, pixels; read by the Gaussian families.
        angle: rotation of the axes, radians; read by the Gaussian families.
        beta: exponent of the Gaussian families; 1 gives a plain Gaussian.
        cutoff: cut-off of sinc, radians per pixel.
        canvas: side of the returned kernels, pixels.
    """
    distance = mahalanobis(sigma_x, sigma_y, angle, canvas)
    beta = beta[:, None, None]
    kernel = torch.where(PLATEAU[kind][:, None, None], plateau(distance, beta), generalized(distance, beta))
    kernel = torch.where((kind == SINC)[:, None, None], low_pass(cutoff, canvas), kernel)
    return _fit(kernel, size)


def sinc_kernels(size: Tensor, cutoff: Tensor, canvas: int) -> Tensor:
    """Returns sinc kernels `(B, canvas, canvas)` of odd sizes in pixels and cut-offs in radians per pixel."""
    return _fit(low_pass(cutoff, canvas), size)


def mahalanobis(sigma_x: Tensor, sigma_y: Tensor, angle: Tensor, canvas: int) -> Tensor:
    """Returns the squared distance `x^T S^-1 x` from the centre.

    `S` is `R diag(sigma_x^2, sigma_y^2) R^T` with the rotation `R` by `angle`.
    """
    y, x = _grid(canvas)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    along, across = cos * x + sin * y, cos * y - sin * x
    return (along / sigma_x[:, None, None]).square() + (across / sigma_y[:, None, None]).square()


def generalized(distance: Tensor, beta: Tensor) -> Tensor:
    """Returns the generalised Gaussian `exp(-d^beta / 2)`, not normalised; `beta = 1` gives the plain Gaussian."""
    return torch.exp(-0.5 * distance.pow(beta))


def plateau(distance: Tensor, beta: Tensor) -> Tensor:
    """Returns the plateau-shaped kernel `1 / (1 + d^beta)`, not normalised."""
    return 1 / (1 + distance.pow(beta))


def low_pass(cutoff: Tensor, canvas: int) -> Tensor:
    """Returns the 2-D sinc filter `w J1(w r) / (2 pi r)` of cut-off `w`; its limit at the centre is `w^2 / (4 pi)`."""
    y, x = _grid(canvas)
    radius = torch.hypot(x, y)
    cutoff = cutoff[:, None, None]
    ring = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    return torch.where(radius == 0, cutoff.square() / (4 * math.pi), ring)


def _fit(kernel: Tensor, size: Tensor) -> Tensor:
    """Cuts each kernel to its own size and normalises the rest."""
    y, x = _grid(kernel.shape[-1])
    inside = torch.maximum(x.abs(), y.abs()) <= (size // 2)[:, None, None]
    kernel = torch.where(inside, kernel, 0)
    return kernel / kernel.sum(dim=(1, 2), keepdim=True)


def _grid(canvas: int) -> tuple[Tensor, Tensor]:
    """Returns rows and columns `(canvas, canvas)`, 0 at the centre."""
    steps = torch.arange(canvas, dtype=torch.float64) - canvas // 2
    return torch.meshgrid(steps, steps, indexing="ij")
