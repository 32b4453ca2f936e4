"""Every kind of file is read, sent through the restorer and written; its pixels are known by hand."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import tifffile
import torch
from PIL import ExifTags, Image, ImageCms
from PIL.PngImagePlugin import putchunk

from dit4sr_pl.images.picture import Picture
from dit4sr_pl.images.picture_files import read_header, read_picture, write_picture
from dit4sr_pl.restoration.pictures import PictureRestorer
from dit4sr_pl.restoration.sizes import result_size
from testing.hand_made_png import levels_of_png, png16
from testing.stand_ins import Bicubic

HEIGHT, WIDTH = 11, 7
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def draw(channels: int, dtype=np.uint8, seed: int = 0) -> np.ndarray:
    shape = (HEIGHT, WIDTH, channels) if channels > 1 else (HEIGHT, WIDTH)
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def through(path, scale=1, alpha="bicubic", restorer=None, **options) -> Picture:
    """Restores a file, writes the result as `out/a.png` next to it and returns the result."""
    pictures = PictureRestorer(restorer or Bicubic(), scale, alpha, 0)
    picture = read_picture(path, **options)
    assert read_header(path, **options).alpha == (picture.alpha is not None)
    (restored,) = pictures([picture], ["a"], [""], lambda pixels: None)
    write_picture(path.parent / "out" / "a.png", restored)
    return restored


def assert_visible_equal(result: np.ndarray, levels: np.ndarray) -> None:
    """Compares levels except the colours of clear pixels, which are those of their neighbours."""
    if result.ndim == 3 and result.shape[2] in (2, 4):
        np.testing.assert_array_equal(result[..., -1], levels[..., -1])
        result, levels = result[levels[..., -1] > 0], levels[levels[..., -1] > 0]
    np.testing.assert_array_equal(result, levels)


def written(path, **options) -> np.ndarray:
    through(path, **options)
    return levels_of_png(path.parent / "out" / "a.png")


@pytest.mark.parametrize("mode, channels", [("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4)])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_eight_bit_levels_stay_as_they_are(tmp_path, mode, channels, suffix):
    levels = draw(channels)
    Image.fromarray(levels, mode).save(tmp_path / f"a{suffix}")
    assert_visible_equal(written(tmp_path / f"a{suffix}"), levels)
    with Image.open(tmp_path / "out/a.png") as image:
        assert image.mode == mode


def test_one_bit_is_grey_and_palettes_are_colour(tmp_path):
    bits = draw(1) > 127
    Image.fromarray(bits).save(tmp_path / "1.png")
    np.testing.assert_array_equal(written(tmp_path / "1.png"), bits * np.uint8(255))

    palette, index = draw(3).reshape(-1, 3)[:16], draw(1) % 16
    image = Image.fromarray(index, "P")
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "p.png")
    np.testing.assert_array_equal(written(tmp_path / "p.png"), palette[index])

    image.save(tmp_path / "t.png", transparency=bytes(range(0, 256, 16)))
    assert_visible_equal(written(tmp_path / "t.png"), np.dstack([palette[index], index * 16]))


def test_a_transparent_colour_becomes_alpha(tmp_path):
    grey, rgb = draw(1) // 128, draw(3) // 128
    Image.fromarray(grey).save(tmp_path / "l.png", transparency=1)
    assert_visible_equal(written(tmp_path / "l.png"), np.dstack([grey, np.where(grey == 1, 0, 255)]))
    Image.fromarray(rgb).save(tmp_path / "rgb.png", transparency=(1, 0, 1))
    hidden = (rgb == (1, 0, 1)).all(2)
    assert hidden.any()
    assert_visible_equal(written(tmp_path / "rgb.png"), np.dstack([rgb, np.where(hidden, 0, 255)]))
    deep = draw(1, np.uint16) // 32768
    (tmp_path / "deep.png").write_bytes(png16(deep, (b"tRNS", b"\0\1")))
    assert_visible_equal(written(tmp_path / "deep.png"), np.dstack([deep, np.where(deep == 1, 0, 65535)]))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bit_png_keeps_every_level(tmp_path, channels):
    levels = draw(channels, np.uint16)
    (tmp_path / "a.png").write_bytes(png16(levels))
    assert_visible_equal(written(tmp_path / "a.png"), levels)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"compression": "lzw", "predictor": True},
        {"compression": "zlib"},
        {"planarconfig": "separate"},
        {"byteorder": ">"},
        {"tile": (16, 16)},
    ],
    ids=str,
)
def test_sixteen_bit_tiff_keeps_every_level(tmp_path, channels, layout):
    levels, layout = draw(channels, np.uint16), dict(layout)
    planes = np.moveaxis(levels, -1, 0) if "planarconfig" in layout and channels > 1 else levels
    if channels == 1:
        layout.pop("planarconfig", None)
    kind = {"photometric": "rgb" if channels > 1 else "minisblack"}
    kind |= {"extrasamples": ["unassalpha"]} if channels == 4 else {}
    tifffile.imwrite(tmp_path / "a.tif", planes, **kind, **layout)
    assert_visible_equal(written(tmp_path / "a.tif"), levels)


@pytest.mark.parametrize("white", [65535, 1023])
@pytest.mark.parametrize("kind", ["P2", "P5"])
def test_a_pgm_of_more_than_eight_bits_keeps_every_level(tmp_path, kind, white):
    levels = draw(1, np.uint16) & white
    levels.flat[:2] = 0, white
    body = " ".join(map(str, levels.flat)).encode() if kind == "P2" else levels.astype(">u2").tobytes()
    path = tmp_path / "a.pgm"
    path.write_bytes(f"{kind}\n# made by hand\n{WIDTH} {HEIGHT}\n{white}\n".encode() + body)
    expected = np.array([round(int(level) / white * 65535) for level in levels.flat]).reshape(levels.shape)
    np.testing.assert_array_equal(written(path), expected)
    assert read_picture(path).bits == 16
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="a.pgm: not a readable image"):
        read_picture(path)


@pytest.mark.parametrize("kind", ["P3", "P6"])
def test_a_ppm_of_more_than_eight_bits_is_refused(tmp_path, kind):
    body = b"0 1 2" if kind == "P3" else bytes(6)
    (tmp_path / "a.ppm").write_bytes(f"{kind}\n1 1\n1023\n".encode() + body)
    with pytest.raises(ValueError, match="a.ppm: .*more than 8 bits per channel.*save it as PNG or TIFF"):
        read_picture(tmp_path / "a.ppm")


def test_sixteen_bit_tiff_whose_white_is_zero_or_whose_colour_is_premultiplied(tmp_path):
    grey = draw(1, np.uint16)
    tifffile.imwrite(tmp_path / "w.tif", grey, photometric="miniswhite")
    np.testing.assert_array_equal(written(tmp_path / "w.tif"), 65535 - grey)
    rgba = draw(4, np.uint16)
    rgba[..., 3] |= 0x8000
    rgba[0, :, 3] = 0
    weight = rgba[..., 3:] / 65535
    stored = np.dstack([np.rint(rgba[..., :3] * weight), rgba[..., 3:]]).astype(np.uint16)
    tifffile.imwrite(tmp_path / "p.tif", stored, photometric="rgb", extrasamples=["assocalpha"])
    result = written(tmp_path / "p.tif").astype(int)
    np.testing.assert_array_equal(result[..., 3], rgba[..., 3])
    assert np.abs(result - rgba)[1:].max() <= 1


def cmyk_profile() -> bytes:
    """Returns a small CMYK profile made by hand: an `lut8` from CMYK to Lab whose corners fade with the ink."""
    corners = np.array([(c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)])
    light = 255 * (1 - 0.25 * corners[:, :3].sum(1)) * (1 - 0.9 * corners[:, 3])
    a = 128 + 50 * (corners[:, 1] - corners[:, 0])
    b = 128 + 50 * (corners[:, 2] - corners[:, 0] * 0.5)
    table = np.stack([light, a, b], axis=1).round().astype(np.uint8).tobytes()
    ramp = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0])
    lut += struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9))) + ramp * 4 + table + ramp * 3
    text = b"text" + bytes(4) + b"none\0"
    description = b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(78 + 2)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    tags, body, at = [], b"", 128 + 4 + 12 * 4
    for name, content in ((b"A2B0", lut), (b"wtpt", white), (b"desc", description), (b"cprt", text)):
        content += bytes(-len(content) % 4)
        tags.append(name + struct.pack(">II", at + len(body), len(content)))
        body += content
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"lcms", 0x02100000, b"prtr", b"CMYK", b"Lab ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return head + struct.pack(">I", 4) + b"".join(tags) + body


def test_cmyk_goes_through_its_profile_or_without_one_by_the_formula(tmp_path):
    ink = draw(4)
    image = Image.fromarray(ink, "CMYK")
    image.save(tmp_path / "plain.tif")
    plain = np.rint((255 - ink[..., :3].astype(float)) * (255 - ink[..., 3:]) / 255)
    assert np.abs(written(tmp_path / "plain.tif") - plain).max() <= 1

    profile = cmyk_profile()
    image.save(tmp_path / "a.tif", icc_profile=profile)
    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        "CMYK",
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    result = written(tmp_path / "a.tif")
    np.testing.assert_array_equal(result, np.asarray(ImageCms.applyTransform(image, transform)))
    assert np.abs(result - plain).max() > 30
    assert through(tmp_path / "a.tif").icc is None  # its values are sRGB now


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "deep.png", "deep.tif"])
def test_every_orientation_comes_out_upright(tmp_path, orientation, kind):
    """EXIF's table names the sides that row 0 and column 0 of the stored pixels are."""
    dtype = np.uint16 if "deep" in kind else np.uint8
    upright = np.zeros((16, 24, 3), dtype)
    upright[:8, :8, 0] = upright[8:, 16:, 1] = upright[:8, 16:, 2] = np.iinfo(dtype).max
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif, path = Image.Exif(), tmp_path / f"a.{kind}"
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Artist] = orientation, "me"
    if kind == "deep.png":
        path.write_bytes(png16(stored, (b"eXIf", exif.tobytes()[6:])))
    elif kind == "deep.tif":
        tags = [(274, "H", 1, orientation, True), (315, "s", 0, "me", True)]
        tifffile.imwrite(path, np.ascontiguousarray(stored), photometric="rgb", extratags=tags)
    else:
        quality = {"quality": 100, "subsampling": 0} if kind == "jpg" else {}
        Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **quality)
    result = written(path)
    assert result.dtype.itemsize == dtype().itemsize and result.shape == upright.shape
    assert np.abs(result.astype(int) - upright).max() <= (4 if kind == "jpg" else 0)
    with Image.open(tmp_path / "out/a.png") as image:
        assert image.getexif()[ExifTags.Base.Orientation] == 1
        assert image.getexif()[ExifTags.Base.Artist] == "me"


@pytest.mark.parametrize("levels", [draw(1), draw(3), draw(3, np.uint16)], ids=["L", "RGB", "RGB16"])
def test_the_profile_is_carried_byte_for_byte(tmp_path, levels):
    if levels.dtype == np.uint16:
        (tmp_path / "a.png").write_bytes(png16(levels, (b"iCCP", b"x\0\0" + zlib.compress(LAB))))
    else:
        Image.fromarray(levels).save(tmp_path / "a.png", icc_profile=LAB)
    np.testing.assert_array_equal(written(tmp_path / "a.png"), levels)  # values stay in its space
    with Image.open(tmp_path / "out/a.png") as image:
        assert image.info["icc_profile"] == LAB


def test_exif_is_carried_with_the_new_size_and_without_its_thumbnail(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.Orientation] = "maker", 6
    details = exif.get_ifd(ExifTags.IFD.Exif)
    details[ExifTags.Base.ExifImageWidth], details[ExifTags.Base.ExifImageHeight] = WIDTH, HEIGHT
    details[ExifTags.Base.LensModel] = "lens"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (1.0, 2.0, 3.0)
    tags = bytearray(exif.tobytes()[6:])
    following = 10 + 12 * struct.unpack_from(">H", tags, 8)[0]  # where IFD 0 names IFD 1, the thumbnail's
    struct.pack_into(">I", tags, following, len(tags))
    tags += struct.pack(">HHHIHHI", 1, ExifTags.Base.Compression, 3, 1, 6, 0, 0)
    Image.fromarray(draw(3)).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + bytes(tags))
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.getexif().get_ifd(ExifTags.IFD.IFD1)
    assert through(tmp_path / "a.jpg", scale=2.7).notes == ()
    with Image.open(tmp_path / "out/a.png") as image:
        size, tags = image.size, image.getexif()
        details = tags.get_ifd(ExifTags.IFD.Exif)
        assert size == (30, 19) and (details[0xA002], details[0xA003]) == size
        assert tags[ExifTags.Base.Make] == "maker" and details[ExifTags.Base.LensModel] == "lens"
        assert tags.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] == (1.0, 2.0, 3.0)
        assert not tags.get_ifd(ExifTags.IFD.IFD1)


def test_a_tiffs_description_is_carried_but_not_its_layout(tmp_path):
    tags = [(315, "s", 0, "me", True)]
    tifffile.imwrite(
        tmp_path / "a.tif", draw(3, np.uint16), photometric="rgb", description="hello", metadata=None, extratags=tags
    )
    through(tmp_path / "a.tif")
    with Image.open(tmp_path / "out/a.png") as image:
        kept = dict(image.getexif())
    assert kept[270] == "hello" and kept[315] == "me"
    assert not kept.keys() & {256, 257, 258, 259, 262, 273, 277, 278, 279}


def test_what_cannot_be_kept_of_a_file_is_noted(tmp_path):
    Image.fromarray(draw(3)).save(tmp_path / "icc.png", icc_profile=b"no profile")
    restored = through(tmp_path / "icc.png")
    assert restored.icc is None and restored.notes == ("its colour profile cannot be read and is left out",)
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "a maker with a long name"
    Image.fromarray(draw(3)).save(tmp_path / "exif.jpg", exif=exif.tobytes()[:-20])
    assert through(tmp_path / "exif.jpg").notes == ("Pillow says: Truncated File Read",)


@pytest.mark.parametrize("scale", [1, 2.7, 4, 8])
@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (5, 3), (15, 25)])
def test_sizes_come_out_exactly_and_match_bicubic(tmp_path, scale, height, width):
    expected = {1: (height, width), 4: (4 * height, 4 * width), 8: (8 * height, 8 * width)}.get(scale)
    by_hand = {1: 3, 9: 24, 5: 14, 3: 8, 15: 41, 25: 68}  # 2.7, 24.3, 13.5, 8.1, 40.5, 67.5
    expected = expected or (by_hand[height], by_hand[width])
    assert result_size((height, width), scale) == expected
    levels = np.random.default_rng(0).integers(1, 256, (height, width, 4), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    result = written(tmp_path / "a.png", scale=scale)
    assert result.shape == (*expected, 4)
    for channel in range(4):
        plane = Image.fromarray(levels[..., channel].astype(np.float32))  # as bytes it clips between the passes
        plane = np.asarray(plane.resize(expected[::-1], Image.Resampling.BICUBIC)).clip(0, 255)
        assert np.abs(result[..., channel] - plane).max() <= 0.51


@pytest.mark.parametrize(
    "scale, length, result", [(2.5, 1, 3), (1.5, 3, 5), (2.5, 5, 13), (1.005, 100, 101), (1, 7, 7)]
)
def test_halves_are_rounded_up_in_decimal(scale, length, result):
    assert result_size((length, length), scale) == (result, result)


def test_opaque_and_empty_areas_stay_so_and_alpha_can_go_through_the_network(tmp_path):
    levels = draw(4)
    levels[..., 3] = np.where(np.arange(WIDTH) < 4, 255, 0)
    Image.fromarray(levels).save(tmp_path / "a.png")
    alpha = written(tmp_path / "a.png", scale=4)[..., 3]
    assert (alpha[:, :8] == 255).all() and not alpha[:, -4:].any()
    restorer = Bicubic()
    other = through(tmp_path / "a.png", scale=4, alpha="network", restorer=restorer)
    color, grey = restorer.calls
    assert grey.names == ["a/alpha"] and grey.lr.shape == color.lr.shape
    assert torch.equal(grey.lr, torch.from_numpy(levels[..., 3] / np.float32(255)).expand(1, 3, -1, -1))
    assert np.abs(other.alpha[0].numpy() * 255 - alpha).max() <= 1


def test_several_frames_are_refused_unless_the_first_is_wanted(tmp_path):
    frames = [Image.fromarray(draw(3, seed=i)) for i in range(3)]
    for suffix in (".gif", ".webp", ".png", ".tif"):
        path = tmp_path / f"a{suffix}"
        lossless = {"lossless": True} if suffix == ".webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **lossless)
        for reading in (read_picture, read_header):
            with pytest.raises(ValueError, match=r"3 frames or pages; first_frame=true restores the first"):
                reading(path)
        first = written(path, first_frame=True)
        with Image.open(path) as image:
            np.testing.assert_array_equal(first[..., :3], np.asarray(image.convert("RGB")))
        if suffix != ".gif":  # of 256 colours
            np.testing.assert_array_equal(first[..., :3], draw(3))


def test_pixels_of_unknown_range_are_refused(tmp_path):
    arrays = {"float": np.full((4, 4), np.nan, np.float32), "int": np.ones((4, 4), np.int32)}
    arrays |= {"signed": np.ones((4, 4), np.int16), "half": np.ones((4, 4, 3), np.float16)}
    for name, array in arrays.items():
        tifffile.imwrite(tmp_path / f"{name}.tif", array, photometric="rgb" if array.ndim == 3 else "minisblack")
        with pytest.raises(ValueError, match=rf"{name}.tif: not a readable image \([^\n]+\)$"):
            read_picture(tmp_path / f"{name}.tif")


def test_a_wrong_checksum_is_damage_and_a_result_that_is_not_finite_is_not_written(tmp_path):
    whole = png16(draw(3))
    broken = bytearray(whole)
    broken[whole.index(b"IDAT") + 50] ^= 1
    (tmp_path / "a.png").write_bytes(broken)
    with pytest.raises(ValueError, match=r"a.png: not a readable image"):
        read_picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match="not finite"):
        write_picture(tmp_path / "out.png", Picture(torch.full((3, 2, 2), torch.nan)))
    assert not (tmp_path / "out.png").exists()


def test_24_megapixels_are_read_and_900_are_refused_by_their_header(tmp_path):
    Image.new("L", (6000, 4000), 7).save(tmp_path / "large.png")
    assert read_picture(tmp_path / "large.png").color.shape == (1, 4000, 6000)
    bomb = BytesIO()
    bomb.write(b"\x89PNG\r\n\x1a\n")
    putchunk(bomb, b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
    putchunk(bomb, b"IDAT", zlib.compress(bytes(1000)))
    putchunk(bomb, b"IEND")
    (tmp_path / "bomb.png").write_bytes(bomb.getvalue())
    with pytest.raises(ValueError, match=r"900000000 pixels\) exceeds limit"):
        read_header(tmp_path / "bomb.png")
