from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dit4sr_pl.restoration.color import COLORS, align
from testing.toy_runs import SAMPLER

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "color.safetensors")


@pytest.mark.parametrize("name", ["adain", "wavelet"])
def test_agrees_with_the_reference(name):
    aligned = align(GOLDEN["restored"].clone(), GOLDEN["reference"], name, 5)
    torch.testing.assert_close(aligned, GOLDEN[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", COLORS)
def test_an_image_aligned_to_itself_stays(name):
    for image in (torch.rand(2, 3, 40, 24), torch.rand(2, 3, 1, 1)):
        torch.testing.assert_close(align(image.clone(), image, name, 5), image)
        channels_last = image.to(memory_format=torch.channels_last)
        torch.testing.assert_close(align(channels_last.clone(), image, name, 5), image)


@pytest.mark.parametrize("name", ["adain", "wavelet", "wavelet_adain"])
def test_takes_over_the_mean_colour_and_keeps_flat_images_finite(name):
    flat, red = torch.full((1, 3, 40, 40), 0.5), torch.tensor([0.8, 0.1, 0.1]).view(1, 3, 1, 1).expand(1, 3, 40, 40)
    torch.testing.assert_close(align(flat.clone(), red, name, 5), red, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "levels"), [("adain", 5), ("wavelet", 5), ("wavelet_adain", 3)])
def test_bands_give_what_the_whole_image_gives(name, levels, monkeypatch):
    restored, reference = torch.rand(2, 1, 3, 150, 20)
    whole = align(restored.clone(), reference, name, levels)
    for rows in (7, 40, 100):
        monkeypatch.setattr("dit4sr_pl.images.files.ROWS", rows)
        torch.testing.assert_close(align(restored.clone(), reference, name, levels), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("levels", [1, 3, 5])
def test_a_wavelet_of_few_levels_takes_only_coarse_bands_from_the_reference(levels):
    restored, reference = torch.rand(2, 1, 3, 160, 160)
    blur = np.ones(1)
    for level in range(levels):
        blur = np.convolve(blur, [0.25, *[0] * (2**level - 1), 0.5, *[0] * (2**level - 1), 0.25])
    difference = (reference - restored)[0].double().numpy()
    for axis in (1, 2):
        difference = np.apply_along_axis(np.convolve, axis, difference, blur, mode="same")
    aligned = align(restored.clone(), reference, "wavelet", levels)
    inside = (slice(None), slice(48, -48), slice(48, -48))
    torch.testing.assert_close(aligned[0][inside], (restored[0] + torch.from_numpy(difference).float())[inside])


def test_both_in_turn_are_one_after_the_other():
    restored, reference = torch.rand(2, 1, 3, 40, 24)
    between = align(restored.clone(), reference, "wavelet", 3)
    both = align(restored.clone(), reference, "wavelet_adain", 3)
    torch.testing.assert_close(both, align(between, reference, "adain", 3))
    assert (both - reference).square().mean() < (restored - reference).square().mean()


@pytest.mark.parametrize("levels", [0, 9, 2.5, 3.0])
def test_levels_that_no_wavelet_has_are_refused(levels):
    with pytest.raises(ValueError, match="wavelet_levels"):
        replace(SAMPLER, wavelet_levels=levels)
