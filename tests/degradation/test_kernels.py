"""Kernels are compared with the formulas, computed value by value; then follow properties of every kernel."""

import math

import pytest
import torch

from dit4sr_pl.degradation.draws import DrawnBlur, DrawnSinc
from dit4sr_pl.degradation.kernels import KINDS, blur_kernels, low_pass
from testing import slow_degradation

CANVAS = 21


def drawn_blur(kind: str, size: int) -> DrawnBlur:
    """Three kernels of one kind and size, with three widths, angles, shapes and cut-offs."""
    isotropic = kind == "iso" or kind.endswith("_iso")
    sigma_x, plain = torch.tensor([0.2, 1.3, 3.0], dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    return DrawnBlur(
        on=plain.bool(),
        kind=plain.long() * KINDS.index(kind),
        size=plain.long() * size,
        sigma_x=sigma_x,
        sigma_y=sigma_x if isotropic else sigma_x.flip(0),
        angle=plain * 0 if isotropic else torch.tensor([-2.0, 0.4, 3.0], dtype=torch.float64),
        beta=plain if kind in ("iso", "aniso") else torch.tensor([0.5, 1.5, 4.0], dtype=torch.float64),
        cutoff=torch.tensor([math.pi / 5, 1.0, math.pi], dtype=torch.float64),
    )


def padded(kernel: torch.Tensor) -> torch.Tensor:
    border = (CANVAS - kernel.shape[-1]) // 2
    return torch.nn.functional.pad(kernel, (border,) * 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [7, 13, 21])
def test_kernels_follow_the_formulas(kind, size):
    drawn = drawn_blur(kind, size)
    expected = torch.cat([padded(slow_degradation.gaussian_family(drawn[i])) for i in range(3)])
    torch.testing.assert_close(drawn.kernels(CANVAS).float(), expected, atol=1e-7, rtol=1e-5)


def test_one_batch_mixes_kinds_and_sizes():
    one = {kind: drawn_blur(kind, 7 + 2 * i)[1] for i, kind in enumerate(KINDS)}
    columns = [torch.stack(column) for column in zip(*(vars(drawn).values() for drawn in one.values()), strict=True)]
    kernels = DrawnBlur(*columns).kernels(CANVAS)
    expected = torch.cat([padded(slow_degradation.gaussian_family(drawn)) for drawn in one.values()])
    torch.testing.assert_close(kernels.float(), expected, atol=1e-7, rtol=1e-5)


def test_final_sinc_kernels_follow_the_formula():
    sizes, cutoffs = torch.tensor([7, 15, 21]), torch.tensor([1.05, 2.0, math.pi], dtype=torch.float64)
    drawn = DrawnSinc(on=sizes > 0, size=sizes, cutoff=cutoffs)
    expected = torch.cat([padded(slow_degradation.sinc(drawn[i])) for i in range(3)])
    torch.testing.assert_close(drawn.kernels(CANVAS).float(), expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_sum_to_one_and_are_symmetric(kind):
    kernels = drawn_blur(kind, 11).kernels(CANVAS)
    torch.testing.assert_close(kernels.sum((1, 2)), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(kernels, kernels.flip(1, 2))
    assert kernels[:, :5].abs().max() == 0 and kernels[:, 5].abs().max() > 0


def test_angle_turns_the_long_axis_from_x_towards_y():
    def second_moments(angle):
        one = torch.ones(1, dtype=torch.float64)
        aniso = torch.tensor([KINDS.index("aniso")])
        kernel = blur_kernels(aniso, torch.tensor([21]), 2 * one, one, angle * one, one, one, CANVAS)[0]
        steps = torch.arange(-10, 11, dtype=torch.float64)
        return (kernel.sum(0) * steps**2).sum(), (kernel.sum(1) * steps**2).sum(), steps @ kernel @ steps

    xx, yy, _ = second_moments(0)
    torch.testing.assert_close(torch.stack([xx, yy]), torch.tensor([4.0, 1.0], dtype=torch.float64), atol=0.01, rtol=0)
    assert second_moments(math.pi / 4)[2] > 1


def test_low_pass_keeps_low_and_stops_high_frequencies():
    gain = torch.fft.rfft2(low_pass(torch.tensor([math.pi / 2], dtype=torch.float64), 201)).abs()[0, 0]
    frequency = torch.linspace(0, math.pi, len(gain), dtype=torch.float64)
    assert (gain[frequency < 1.2] - 1).abs().max() < 0.05
    assert gain[frequency > 2.0].max() < 0.05
