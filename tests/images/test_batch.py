"""Images that a Python caller gives, compared with what diffusers' `VaeImageProcessor` makes of them."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from dit4sr_pl.common.randomness import generator
from dit4sr_pl.images.batch import image_names, to_batch

BYTES = (torch.rand(2, 3, 6, 8, generator=generator("cpu", 0)) * 255).round().byte()
FLOATS = BYTES / 255
ARRAYS = FLOATS.permute(0, 2, 3, 1).numpy()
GREY = FLOATS[:, :1]


@pytest.mark.filterwarnings("ignore:Passing `image` as a list of 4d:FutureWarning")
@pytest.mark.parametrize(
    "image",
    [
        ARRAYS[0],
        ARRAYS,
        [ARRAYS[0], ARRAYS[1]],
        [ARRAYS[:1], ARRAYS[1:]],
        FLOATS[0],
        FLOATS,
        [FLOATS[0], FLOATS[1]],
        [FLOATS[:1], FLOATS[1:]],
        Image.fromarray(BYTES[0].permute(1, 2, 0).numpy()),
        [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in BYTES],
    ],
)
def test_images_are_taken_as_diffusers_takes_them(image):
    expected = VaeImageProcessor(vae_scale_factor=1, do_normalize=False).preprocess(image)
    torch.testing.assert_close(to_batch(image), expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    "image, expected",
    [
        (BYTES, FLOATS),
        (BYTES.permute(0, 2, 3, 1).numpy(), FLOATS),
        (BYTES[0].permute(1, 2, 0).numpy()[::-1, ::-1], FLOATS[:1].flip(2, 3)),
        ((ARRAYS[0] * 65535).round().astype(np.uint16), FLOATS[:1]),
        (ARRAYS.astype(np.float64), FLOATS),
        (FLOATS.double().requires_grad_(), FLOATS),
        (GREY, GREY.expand(2, 3, -1, -1)),
        (GREY[0, 0], GREY[:1].expand(1, 3, -1, -1)),
        (GREY[0, 0].numpy(), GREY[:1].expand(1, 3, -1, -1)),
        ([GREY[0, 0].numpy(), GREY[1, 0, :, :, None].numpy()], GREY.expand(2, 3, -1, -1)),
        (GREY[0, 0] > 0.5, (GREY[:1] > 0.5).float().expand(1, 3, -1, -1)),
        ((ARRAYS[0], Image.fromarray(BYTES[1].permute(1, 2, 0).numpy())), FLOATS),
    ],
)
def test_whole_numbers_grey_flipped_and_mixed_images_are_taken_too(image, expected):
    batch = to_batch(image)
    assert batch.dtype == torch.float32 and not batch.requires_grad
    torch.testing.assert_close(batch, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_path_is_read_as_a_file(kind, tmp_path):
    Image.fromarray(BYTES[0].permute(1, 2, 0).numpy()).save(tmp_path / "a.b.png")
    assert torch.equal(to_batch(kind(tmp_path / "a.b.png")), FLOATS[:1])
    assert image_names([kind(tmp_path / "a.b.png")], 1) == ["a.b"] and image_names(FLOATS, 2) == ["0", "1"]


@pytest.mark.parametrize(
    "image, message",
    [
        ([], "an empty list; give a Pillow image"),
        (None, "NoneType; give"),
        (7, "int; give"),
        ({"a": 1}, "dict; give"),
        (b"bytes", "bytes; give"),
        ([[FLOATS[0]]], "list; give"),
        ([FLOATS[0], None], "NoneType; give"),
        (np.empty((0, 4, 3)), r"an array of \(0, 4, 3\)"),
        (FLOATS[0].permute(1, 2, 0), r"a tensor of \(6, 8, 3\); give .* a tensor \(3, h, w\)"),
        (FLOATS[0].numpy(), r"an array of \(3, 6, 8\); give .* an array \(h, w, 3\)"),
        (torch.rand(4, 6, 8), r"a tensor of \(4, 6, 8\)"),
        (torch.rand(1, 1, 3, 6, 8), "a tensor of"),
        (np.float32(0.5) * np.ones(3, np.float32), r"an array of \(3,\)"),
        (np.array(["a"]), "an array of <U1"),
        (np.array([[None]]), "an array of object"),
        (ARRAYS.astype(complex), "an array of complex128"),
        (FLOATS * torch.nan, "not finite"),
        (FLOATS / 0, "not finite"),
        (ARRAYS * 255, "floats from .* to 255; they must be in 0..1"),
        (FLOATS * 2 - 1, "floats from -0.9"),
        (BYTES.long(), "whole numbers of torch.int64"),
        ([FLOATS[0], FLOATS[0, :, :4]], "one size per call, got 8x6, 8x4"),
        ("photo.jpg", "photo.jpg: "),
    ],
)
def test_the_rest_is_refused_in_one_line(image, message):
    with pytest.raises(ValueError, match=message) as refused:
        to_batch(image)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300
