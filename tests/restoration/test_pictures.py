"""What becomes of clear pixels and of pictures without colour; the network's place is taken by what shows it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from dit4sr_pl.images.picture import Picture
from dit4sr_pl.images.picture_files import read_picture
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.restoration.pictures import PictureRestorer, under_clear
from dit4sr_pl.restoration.sizes import TargetSize, result_size
from testing.hand_made_png import png16
from testing.stand_ins import Bicubic


def disk(color: int, hidden: int, soft: bool = False) -> np.ndarray:
    """Returns grey and alpha `(40, 40, 2)` of a disk on clear pixels of another level."""
    mask = Image.new("L", (160, 160))
    ImageDraw.Draw(mask).ellipse((32, 32, 128, 128), fill=255)
    alpha = np.asarray(mask.resize((40, 40), Image.Resampling.BOX))
    if not soft:
        alpha = np.where(alpha > 127, 255, 0).astype(np.uint8)
    return np.dstack([np.where(alpha > 0, color, hidden).astype(np.uint8), alpha])


def save(path, levels: np.ndarray, mode: str) -> None:
    grey, alpha = levels[..., 0], levels[..., 1]
    if mode == "LA16":
        path.write_bytes(png16(levels.astype(np.uint16) * 257))
    elif mode == "RGBA16":
        path.write_bytes(png16(np.dstack([grey, grey, grey, alpha]).astype(np.uint16) * 257))
    elif mode == "P":
        image = Image.fromarray(np.where(alpha > 0, 1, 0).astype(np.uint8), "P")
        image.putpalette([int(grey[0, 0])] * 3 + [int(grey[20, 20])] * 3)
        image.save(path, transparency=0)
    else:
        planes = [grey, alpha] if mode == "LA" else [grey, grey, grey, alpha]
        Image.fromarray(np.dstack(planes), mode).save(path)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "LA16", "RGBA16", "P"])
def test_a_rim_has_no_shadow_of_what_clear_pixels_hide(tmp_path, mode, soft):
    if mode == "P" and soft:
        pytest.skip("one transparent entry has no soft edge")
    for color, hidden in ((255, 0), (0, 255)):
        save(tmp_path / "a.png", disk(color, hidden, soft), mode)
        (restored,) = PictureRestorer(Bicubic(), 4, "bicubic", 0)([read_picture(tmp_path / "a.png")], ["a"], [""], id)
        composed = restored.color * restored.alpha + (1 - restored.alpha) * color / 255
        assert (composed * 255 - color).abs().max() <= 1  # darkest rim 147 where colours are mixed


def test_clear_pixels_take_the_colours_of_their_visible_neighbours_and_others_keep_theirs():
    color, alpha = torch.rand(3, 13, 9), torch.zeros(1, 13, 9)
    alpha[:, 2:6, 3:7] = 0.5
    filled = under_clear(color, alpha)
    assert torch.equal(filled[:, 2:6, 3:7], color[:, 2:6, 3:7])
    visible = color[:, 2:6, 3:7].flatten(1)
    assert (filled.flatten(1) >= visible.amin(1, keepdim=True) - 1e-6).all()
    assert (filled.flatten(1) <= visible.amax(1, keepdim=True) + 1e-6).all()
    for kept in (None, torch.ones(1, 13, 9), torch.zeros(1, 13, 9)):
        assert under_clear(color, kept) is color
    for size in ((1, 1), (1, 7), (7, 1)):
        alpha = torch.zeros(1, *size)
        alpha[0, 0, 0] = 1
        red = torch.tensor([1.0, 0, 0]).view(3, 1, 1) * alpha
        torch.testing.assert_close(under_clear(red, alpha), torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, *size))


class Colorful(Bicubic):
    """A network that adds a colour of its own to everything."""

    def __call__(self, *arguments, **options):
        return (super().__call__(*arguments, **options) + torch.tensor([0.1, -0.05, 0.2]).view(1, 3, 1, 1)).clamp(0, 1)


def grey_files(folder) -> list:
    grey = np.random.default_rng(0).integers(0, 256, (12, 9), dtype=np.uint8)
    checkers = (np.indices((12, 9)).sum(0) % 2 * 255).astype(np.uint8)
    for name, levels in (("noise", grey), ("checkers", checkers)):
        rgb = Image.fromarray(np.dstack([levels] * 3))
        Image.fromarray(levels).save(folder / f"{name}_l.png")
        Image.fromarray(np.dstack([levels, 255 - levels])).save(folder / f"{name}_la.png")
        rgb.save(folder / f"{name}_rgb.png")
        rgb.save(folder / f"{name}_rgb.jpg")
        rgb.quantize(256).save(folder / f"{name}_palette.png")
        (folder / f"{name}_rgb16.png").write_bytes(png16(np.dstack([levels] * 3).astype(np.uint16) * 257))
    near = np.dstack([grey, grey, grey]).clip(2, 253)
    near[..., 2] += 2
    Image.fromarray(near).save(folder / "nearly.png")
    hidden = np.dstack([grey, grey, grey, np.where(grey > 99, 255, 0)]).astype(np.uint8)
    hidden[hidden[..., 3] == 0, 0] = 255
    Image.fromarray(hidden).save(folder / "hidden.png")
    return sorted(folder.iterdir())


def test_pictures_without_colour_come_back_without_in_whatever_mode(tmp_path):
    for path in grey_files(tmp_path):
        picture = read_picture(path)
        (restored,) = PictureRestorer(Colorful(), 4, "bicubic", 0)([picture], ["a"], [""], id)
        assert len(restored.color) == len(picture.color), path  # what was saved as grey is saved as grey
        assert (restored.color.amax(0) - restored.color.amin(0)).max() * 255 <= 3, path
        (colored,) = PictureRestorer(Colorful(), 4, "bicubic", 0, colorize=True)([picture], ["a"], [""], id)
        assert len(colored.color) == 3
        assert (colored.color.amax(0) - colored.color.amin(0)).max() * 255 > 30, path


def test_a_grey_profile_does_not_stay_in_a_picture_that_takes_colours():
    grey = replace(Picture(torch.rand(1, 5, 4)), icc=b"a profile for grey")
    for colorize in (False, True):
        (restored,) = PictureRestorer(Colorful(), 2, "bicubic", 0, colorize=colorize)([grey], ["a"], [""], id)
        assert (restored.icc is None, len(restored.notes)) == (colorize, int(colorize))


def test_pictures_with_a_little_colour_keep_what_the_network_makes_of_it(tmp_path):
    levels = np.full((8, 8, 3), 100, np.uint8)
    levels[4, 4, 0] = 104
    Image.fromarray(levels).save(tmp_path / "a.png")
    (restored,) = PictureRestorer(Colorful(), 2, "bicubic", 0)([read_picture(tmp_path / "a.png")], ["a"], [""], id)
    assert (restored.color.amax(0) - restored.color.amin(0)).min() * 255 > 30


def test_a_tint_that_is_hardly_one_is_that_of_the_lr_image():
    lr = torch.full((1, 3, 5, 4), 0.5)
    lr[:, 2] += 2 / 255
    (restored,) = PictureRestorer(Colorful(), 2, "bicubic", 0)([Picture(lr[0])], ["a"], [""], id)
    expected = enlarge(lr, (10, 8))[0]
    torch.testing.assert_close(restored.color - restored.color.mean(0), expected - expected.mean(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "size, target, expected",
    [
        ((100, 200), TargetSize("size", 400), (200, 400)),
        ((200, 100), TargetSize("size", 401), (401, 201)),
        ((100, 200), TargetSize("short_side", 300), (300, 600)),
        ((1000, 3000), TargetSize("size", 1500), (500, 1500)),
        ((1, 3000), TargetSize("size", 300), (1, 300)),
        ((1000, 1000), TargetSize("megapixels", 4), (2000, 2000)),
        ((1200, 1600), TargetSize("megapixels", 0.48), (600, 800)),
        ((1, 1), TargetSize("short_side", 8), (8, 8)),
    ],
)
def test_a_size_is_reached_by_one_factor_for_both_sides(size, target, expected):
    assert result_size(size, target) == expected


def test_more_than_eight_times_the_sides_is_refused():
    with pytest.raises(ValueError, match=r"size=4096 is 13.7 times its 300x200 pixels; at most 8 times are restored"):
        result_size((200, 300), TargetSize("size", 4096))


def test_a_size_gives_what_the_scale_of_the_same_factor_gives():
    lr = Picture(torch.rand(3, 11, 7))
    by_size, by_scale = (
        PictureRestorer(Bicubic(), each, "bicubic", 0)([lr], ["a"], [""], id)[0].color
        for each in (TargetSize("size", 44), 4)
    )
    assert torch.equal(by_size, by_scale)
