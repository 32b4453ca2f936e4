from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dit4sr_pl.restoration.color import ALIGNMENTS

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "color.safetensors")


@pytest.mark.parametrize("name", ["adain", "wavelet"])
def test_agrees_with_the_reference(name):
    aligned = ALIGNMENTS[name](GOLDEN["restored"].clone(), GOLDEN["reference"])
    torch.testing.assert_close(aligned, GOLDEN[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_an_image_aligned_to_itself_stays(name):
    for image in (torch.rand(2, 3, 40, 24), torch.rand(2, 3, 1, 1)):
        torch.testing.assert_close(ALIGNMENTS[name](image.clone(), image), image)
        channels_last = image.to(memory_format=torch.channels_last)
        torch.testing.assert_close(ALIGNMENTS[name](channels_last.clone(), image), image)


@pytest.mark.parametrize("name", ["adain", "wavelet"])
def test_takes_over_the_mean_colour_and_keeps_flat_images_finite(name):
    flat, red = torch.full((1, 3, 40, 40), 0.5), torch.tensor([0.8, 0.1, 0.1]).view(1, 3, 1, 1).expand(1, 3, 40, 40)
    torch.testing.assert_close(ALIGNMENTS[name](flat.clone(), red), red, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["adain", "wavelet"])
def test_bands_give_what_the_whole_image_gives(name, monkeypatch):
    restored, reference = torch.rand(2, 1, 3, 150, 20)
    whole = ALIGNMENTS[name](restored.clone(), reference)
    for rows in (7, 40, 100):
        monkeypatch.setattr("dit4sr_pl.images.files.ROWS", rows)
        torch.testing.assert_close(ALIGNMENTS[name](restored.clone(), reference), whole, atol=1e-6, rtol=0)
