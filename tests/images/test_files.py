import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dit4sr_pl.data.demo_photos import TEST, TRAIN, write_demo_photos
from dit4sr_pl.images.files import IMAGE_SUFFIXES, find_images, read_image, write_image


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def pixels(path) -> np.ndarray:
    image = read_image(path)
    assert image.dtype == torch.uint8 and image.shape[0] == 3 and image.is_contiguous()
    return image.permute(1, 2, 0).numpy()


def test_import_is_cheap():
    code = (
        "import sys, dit4sr_pl.images.files; print([m for m in ('torch', 'lightning', 'kornia') if m in sys.modules])"
    )
    env = {"PYTHONPATH": ":".join(sys.path)}
    seen = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_suffix_is_found_and_read(tmp_path, rgb, suffix):
    Image.fromarray(rgb).save(tmp_path / f"a{suffix}")
    (path,) = find_images(tmp_path)
    np.testing.assert_array_equal(pixels(path), np.asarray(Image.open(path).convert("RGB")))


def test_find_images_is_recursive_sorted_and_skips_what_is_hidden(tmp_path, rgb):
    tmp_path = tmp_path / ".photos"  # the folder itself may be hidden
    names = ["b.png", "a.JPG", "sub/c.png", "._b.png", "notes.txt", ".thumbnails/b.png", "sub/.git/deep/d.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/d.png").touch()
    (tmp_path / "sub/link").symlink_to(tmp_path / "elsewhere")
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert found == ["a.JPG", "b.png", "elsewhere/d.png", "sub/c.png", "sub/link/d.png"]
    assert [path.name for path in find_images(tmp_path, (".txt",))] == ["notes.txt"]


def test_find_images_errors_name_the_folder_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent: no such folder; give the path") as missing:
        find_images(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no images in this folder or below it \(looked for .png, .jpg") as empty:
        find_images(tmp_path)
    assert str(tmp_path) in str(empty.value)
    assert "\n" not in str(missing.value) + str(empty.value)


def test_grey_palette_and_one_bit(tmp_path, rgb):
    image = Image.fromarray(rgb)
    for mode in ("L", "P", "1"):
        path = tmp_path / f"{mode}.png"
        image.convert(mode).save(path)
        np.testing.assert_array_equal(pixels(path), np.asarray(image.convert(mode).convert("RGB")))
    one_bit = pixels(tmp_path / "1.png")
    assert set(np.unique(one_bit)) == {0, 255}


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    deep = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    Image.fromarray(deep).save(tmp_path / f"deep{suffix}")
    grey = pixels(tmp_path / f"deep{suffix}")
    assert np.abs(grey - deep[..., None] / 257.0).max() <= 0.5
    assert grey.min() == 0 and grey.max() == 255


def test_cmyk_is_converted(tmp_path, rgb):
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "a.tif")
    np.testing.assert_array_equal(pixels(tmp_path / "a.tif"), rgb)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_over_white(tmp_path, rgb, mode):
    alpha = np.random.default_rng(1).integers(0, 256, (20, 30), dtype=np.uint8)
    image = Image.fromarray(np.dstack([rgb, alpha]), "RGBA").convert(mode)
    image.save(tmp_path / "a.png")
    colour = np.asarray(image.convert("RGBA"))[..., :3].astype(float)
    weight = alpha[..., None] / 255
    assert np.abs(pixels(tmp_path / "a.png") - (weight * colour + (1 - weight) * 255)).max() <= 1


def test_transparent_colour_and_palette_entry_become_white(tmp_path):
    rgb = np.full((4, 4, 3), 10, dtype=np.uint8)
    rgb[0] = 200
    Image.fromarray(rgb).save(tmp_path / "rgb.png", transparency=(10, 10, 10))
    palette = Image.fromarray(rgb[..., 0] // 200, "P")
    palette.putpalette([10, 10, 10, 200, 200, 200])
    palette.save(tmp_path / "palette.png", transparency=0)
    expected = np.full((4, 4, 3), 255)
    expected[0] = 200
    for name in ("rgb.png", "palette.png"):
        np.testing.assert_array_equal(pixels(tmp_path / name), expected)


@pytest.mark.parametrize("orientation, turn", [(3, 2), (6, 3), (8, 1)])
def test_exif_rotation_is_applied(tmp_path, rgb, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rgb).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), np.rot90(rgb, turn))


def test_unreadable_files_are_named_with_the_reason(tmp_path, rgb):
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"text.png: not a readable image \(unknown format\)$"):
        read_image(tmp_path / "text.png")
    with pytest.raises(ValueError, match=r"absent.png: not a readable image \(no such file\)$"):
        read_image(tmp_path / "absent.png")
    Image.fromarray(rgb).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"half.jpg: not a readable image \(.*truncated"):
        read_image(tmp_path / "half.jpg")
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float.tif: not a readable image \(32-bit pixels"):
        read_image(tmp_path / "float.tif")


def test_written_image_reads_back_within_half_a_level(tmp_path):
    image = torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2
    write_image(tmp_path / "new/folder/a.png", image)
    error = read_image(tmp_path / "new/folder/a.png") / 255 - image.clamp(0, 1)
    assert error.abs().max() <= 0.5 / 255 + 1e-6
    write_image(tmp_path / "new/folder/a.png", image.bfloat16().flip(0))  # replaces
    assert [path.name for path in (tmp_path / "new/folder").iterdir()] == ["a.png"]


def test_write_image_refuses_what_it_would_spoil(tmp_path):
    image = torch.rand(3, 4, 4)
    for wrong in (image[:1], image[None], image.byte(), torch.where(image > 0.5, torch.nan, image)):
        with pytest.raises(ValueError, match=r"a.png: not a finite float image"):
            write_image(tmp_path / "a.png", wrong)
    with pytest.raises(ValueError, match="give a name that ends in .png"):
        write_image(tmp_path / "a.jpg", image)
    assert not list(tmp_path.iterdir())


def test_interrupted_write_leaves_the_old_image(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", torch.zeros(3, 4, 4))

    def disk_full(self, path, **_):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_image(tmp_path / "a.png", torch.ones(3, 4, 4))
    assert read_image(tmp_path / "a.png").max() == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_demo_photos_are_written_once_and_read_back(tmp_path):
    from skimage import data

    for part in ("train", "test"):  # existing stand-ins for all but three: encoding every photo takes seconds
        for name in set({"train": TRAIN, "test": TEST}[part]) - {"coins", "china", "motorcycle"}:
            write_image(tmp_path / part / f"{name}.png", torch.zeros(3, 2, 2))
    write_demo_photos(tmp_path)
    assert [path.stem for path in find_images(tmp_path / "train")] == sorted(TRAIN)
    assert [path.stem for path in find_images(tmp_path / "test")] == sorted(TEST)
    np.testing.assert_array_equal(pixels(tmp_path / "train/coins.png"), np.dstack([data.coins()] * 3))
    np.testing.assert_array_equal(pixels(tmp_path / "train/motorcycle.png"), data.stereo_motorcycle()[0])
    assert read_image(tmp_path / "test/china.png").shape == (3, 427, 640)
    assert read_image(tmp_path / "test/rocket.png").shape == (3, 2, 2)  # left alone
