"""Operations are compared with Kornia, SciPy and Pillow; then follow properties of each."""

import io

import numpy as np
import pytest
import scipy.stats
import torch
from kornia.filters import filter2d
from PIL import Image
from skimage import data

from dit4sr_pl.degradation import ops
from dit4sr_pl.degradation.jpeg import CHROMA, LUMA, jpeg, quantisation_table
from testing import slow_degradation


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    return torch.from_numpy(data.astronaut()[:160, 150:330].copy()).permute(2, 0, 1)[None] / 255


def test_blur_equals_a_direct_convolution(photo):
    kernel = torch.rand(21, 21, generator=torch.Generator().manual_seed(0))
    kernel /= kernel.sum()
    torch.testing.assert_close(ops.blur(photo, kernel), filter2d(photo, kernel[None]), atol=1e-5, rtol=0)


def test_sharpening_equals_its_full_2d_form(photo):
    expected = slow_degradation.sharpen(photo, 51, 0.5, 10)
    sharp = ops.sharpen(photo, 51, 0.5, 10)
    # A residual at the threshold may fall on either side of it.
    torch.testing.assert_close(sharp, expected, atol=5e-4, rtol=0)
    assert (sharp - photo).abs().max() > 0.1 and sharp.min() >= 0 and sharp.max() <= 1


def test_sharpening_leaves_weak_texture_alone():
    texture = 0.5 + 0.01 * torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ops.sharpen(texture, 51, 0.5, 10), texture)


@pytest.mark.parametrize("quality", [30, 60, 95])
def test_jpeg_is_close_to_libjpeg(photo, quality):
    file = io.BytesIO()
    Image.fromarray((photo[0].permute(1, 2, 0) * 255).byte().numpy()).save(file, "JPEG", quality=quality)
    libjpeg = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None] / 255
    ours = jpeg(photo, quality)
    error, lost = (ours - libjpeg).square().mean(), (photo - libjpeg).square().mean()
    assert error < 1.5e-4 and error < lost / 2


@pytest.mark.parametrize("quality", [1, 40, 75, 100])
def test_jpeg_steps_are_those_of_libjpeg(quality):
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG", quality=quality)
    tables = Image.open(file).quantization
    for ours, table in ((LUMA, tables[0]), (CHROMA, tables[1])):
        assert quantisation_table(ours, quality).flatten().tolist() == list(table)


def test_jpeg_keeps_odd_sizes(photo):
    odd = photo[..., :37, :53]
    assert jpeg(odd, 40).shape == odd.shape and (jpeg(odd, 95) - odd).abs().mean() < 0.02


@pytest.mark.parametrize("quality", [30, 90])
def test_jpeg_keeps_grey_grey(quality):
    flat = torch.full((1, 3, 16, 16), 128 / 255)
    torch.testing.assert_close(jpeg(flat, quality), flat, atol=1e-5, rtol=0)


@pytest.mark.parametrize("peak", [2, 64, 256])
def test_poisson_counts_are_quantiles(peak):
    rng = torch.Generator().manual_seed(peak)
    levels = torch.randint(256, (5000,), generator=rng)
    uniform = torch.rand(5000, generator=rng, dtype=torch.float64)
    expected = scipy.stats.poisson.ppf(uniform.numpy(), levels.numpy() / 255 * peak).clip(0)
    assert ops.poisson_counts(levels, uniform, peak).tolist() == expected.astype(int).tolist()


def test_poisson_noise_has_the_variance_of_its_level():
    # Four distinct values: a peak of 4 counts, hence the variance level / 4.
    image = torch.tensor([0.2, 0.4, 0.4, 0.6]).repeat_interleave(64).expand(1, 3, 64, 256).clone()
    image[..., 0] = 102 / 255 / 2
    noise = (ops.add_poisson_noise(image, 0.2, False, seed=1) - image) / 0.2
    assert noise[..., 70:180].var() == pytest.approx(0.4 / 4, rel=0.05)
    assert noise[..., 70:180].mean() == pytest.approx(0, abs=0.01)


def test_gaussian_noise_has_its_sigma():
    image = torch.full((1, 3, 128, 128), 0.5)
    noise = ops.add_gaussian_noise(image, 12, False, seed=3) - image
    assert noise.std() * 255 == pytest.approx(12, rel=0.02)
    assert torch.corrcoef(noise.flatten(2)[0])[0, 1].abs() < 0.05


@pytest.mark.parametrize("add_noise", [ops.add_gaussian_noise, ops.add_poisson_noise])
def test_grey_noise_is_the_same_in_all_colours(add_noise, photo):
    dim = photo / 2 + 0.25
    noise = add_noise(dim, 0.5, True, seed=5) - dim
    torch.testing.assert_close(noise[:, :1].expand_as(noise), noise, atol=1e-6, rtol=0)
    assert noise.std() > 1e-3


@pytest.mark.parametrize("add_noise", [ops.add_gaussian_noise, ops.add_poisson_noise])
def test_noise_is_a_function_of_its_seed_and_clamped(add_noise, photo):
    first, again, other = (add_noise(photo, 3.0, False, seed) for seed in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.min() >= 0 and first.max() <= 1


def test_one_changed_pixel_leaves_the_poisson_noise_of_the_others_alone(photo):
    changed = photo.clone()
    changed[..., 10, 10] = photo[..., 10, 11]
    noise, noise_changed = (ops.add_poisson_noise(image, 1.0, False, seed=2) - image for image in (photo, changed))
    differs = (noise - noise_changed).abs() > 1e-6
    assert differs.sum() <= 3 and not differs[..., :10, :].any()


def test_resize_takes_each_mode(photo):
    results = [ops.resize(photo, (50, 61), mode) for mode in range(len(ops.MODES))]
    assert all(result.shape == (1, 3, 50, 61) for result in results)
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])
    torch.testing.assert_close(ops.resize(photo, (80, 90), 0), torch.nn.functional.avg_pool2d(photo, 2))


def test_to_8_bits_rounds_and_clamps():
    image = torch.tensor([-0.2, 0.0, 0.5 / 255 + 1e-4, 0.71, 1.3])
    expected = torch.tensor([0, 0, 1, 181, 255]) / 255
    torch.testing.assert_close(ops.to_8_bits(image), expected)
