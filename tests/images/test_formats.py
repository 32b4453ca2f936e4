"""Results of all formats, what of metadata each of them holds, and which files of a folder are images."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import tifffile
import torch
from PIL import ExifTags, Image, ImageCms, IptcImagePlugin, PngImagePlugin

from dit4sr_pl.images import encoding
from dit4sr_pl.images.files import find_images
from dit4sr_pl.images.formats import RESULTS, check_sides, find_pictures, is_complete, result_format
from dit4sr_pl.images.picture import Picture, check_colors
from dit4sr_pl.images.picture_files import read_header, read_picture, write_picture
from testing.hand_made_png import png16

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SUBJECT_AREA = 0x9214
IPTC = b"\x1c\x02\x05\0\x05title\x1c\x02\x78\0\x07caption"
XMP = b"""<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""
 xmlns:tiff="http://ns.adobe.com/tiff/1.0/" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:crs="http://ns.adobe.com/camera-raw-settings/1.0/" xmlns:GPano="http://ns.google.com/photos/1.0/panorama/"
 tiff:Orientation="6" tiff:ImageWidth="7" xmp:Rating="4" crs:Exposure2012="+1.00" GPano:FullPanoWidthPixels="7">
<dc:creator><rdf:Seq><rdf:li>Zo\xc3\xab</rdf:li></rdf:Seq></dc:creator><xmp:Thumbnails><rdf:Alt/></xmp:Thumbnails>
</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>"""


def smooth(channels: int = 3) -> torch.Tensor:
    ramp = torch.linspace(0.1, 0.9, 24)
    return torch.stack([ramp.expand(16, -1), ramp.flip(0).expand(16, -1), ramp[:16, None].expand(-1, 24)][:channels])


def full_jpeg(path) -> None:
    """Writes a JPEG with every kind of metadata."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.Orientation] = "maker", 1
    details = exif.get_ifd(ExifTags.IFD.Exif)
    details[ExifTags.Base.ExifImageWidth], details[ExifTags.Base.LensModel] = 24, "lens"
    details[SUBJECT_AREA] = (12, 8)
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (1.0, 2.0, 3.0)
    resource = b"8BIM" + struct.pack(">HHI", 0x0404, 0, len(IPTC)) + IPTC + bytes(len(IPTC) % 2)
    content = b"Photoshop 3.0\0" + resource
    options = {"exif": exif, "xmp": XMP, "icc_profile": SRGB, "dpi": (300, 300), "comment": "Grüße".encode()}
    options["extra"] = b"\xff\xed" + struct.pack(">H", len(content) + 2) + content
    Image.fromarray((smooth().permute(1, 2, 0) * 255).byte().numpy()).save(path, "JPEG", quality=95, **options)


def write(path, picture: Picture, format: str, **options) -> tuple[Image.Image, list[str]]:
    notes = write_picture(path, picture, format=format, **options)
    image = Image.open(path)
    image.load()
    return image, notes


@pytest.mark.parametrize("format", RESULTS)
@pytest.mark.parametrize("channels, alpha", [(1, False), (3, False), (1, True), (3, True)])
def test_every_format_holds_the_pixels(tmp_path, format, channels, alpha):
    color = smooth(channels)
    picture = Picture(color, torch.linspace(0, 1, 16).view(1, -1, 1).expand(1, 16, 24) if alpha else None)
    image, notes = write(tmp_path / f"a{RESULTS[format][0]}", picture, format)
    assert image.format == format.upper() and is_complete(tmp_path / f"a{RESULTS[format][0]}", format)
    levels = np.asarray(image.convert("RGBA")).astype(float) / 255
    if format == "jpeg" and alpha:
        assert notes == ["its transparency is laid over white, since JPEG has none"] and image.mode in ("L", "RGB")
        color = color * picture.alpha + 1 - picture.alpha
    elif alpha:
        assert np.abs(levels[..., 3] - picture.alpha[0].numpy()).max() < 0.03
    visible = levels[..., 3] > 0.1
    expected = color.permute(1, 2, 0).expand(-1, -1, 3).numpy()
    assert np.abs(levels[..., :3] - expected)[visible].max() < (0.004 if format in ("png", "tiff") else 0.06)
    if channels == 1:
        assert np.ptp(levels[..., :3], axis=2).max() * 255 <= 3
    if format in ("png", "tiff", "jpeg"):
        assert image.mode == ("L" if channels == 1 else "RGB") + ("A" if alpha and format != "jpeg" else "")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_tiff_keeps_sixteen_bits(tmp_path, channels):
    levels = np.random.default_rng(0).integers(1, 65536, (5, 7, channels), dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(png16(levels.squeeze(2) if channels == 1 else levels))
    write_picture(tmp_path / "b.tif", read_picture(tmp_path / "a.png"), format="tiff")
    if channels == 2:  # Pillow opens grey with alpha as RGB alone
        levels = levels[..., [0, 0, 0, 1]]
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "b.tif").reshape(levels.shape), levels)
    again = read_picture(tmp_path / "b.tif")
    assert again.bits == 16 and (again.alpha is not None) == (channels in (2, 4))


def test_a_tiff_too_large_for_addresses_of_32_bits_is_a_bigtiff(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "LARGEST_TIFF", 600)
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ISOSpeedRatings] = 100
    for side, starts, notes in ((10, b"II*\0", 0), (20, b"II+\0", 1)):
        picture = Picture(smooth(3)[:, :side, :side], exif=exif.tobytes())
        assert len(write_picture(tmp_path / "a.tif", picture, format="tiff")) == notes
        assert (tmp_path / "a.tif").read_bytes().startswith(starts)
        assert read_picture(tmp_path / "a.tif").color.shape == (3, min(side, 16), side)


def test_quality_changes_what_lossy_files_take(tmp_path):
    noise = Picture(torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)))
    for format in ("jpeg", "webp", "avif"):
        for quality in (10, 100):
            write_picture(tmp_path / f"{format}{quality}", noise, format=format, quality=quality)
        small, large = ((tmp_path / f"{format}{quality}").stat().st_size for quality in (10, 100))
        assert 2 * small < large


@pytest.mark.parametrize("format", RESULTS)
def test_metadata_that_are_true_of_the_result_are_carried(tmp_path, format):
    full_jpeg(tmp_path / "a.jpg")
    picture = read_picture(tmp_path / "a.jpg")
    assert picture.notes == ()
    image, notes = write(tmp_path / f"b{RESULTS[format][0]}", picture, format)
    assert image.info["icc_profile"] == SRGB
    exif = image.getexif()
    details = exif.get_ifd(ExifTags.IFD.Exif)
    assert (exif[ExifTags.Base.Make], details[ExifTags.Base.LensModel], details[0xA002]) == ("maker", "lens", 24)
    assert SUBJECT_AREA not in details
    assert exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] == (1.0, 2.0, 3.0)
    xmp = bytes(image.info["xmp"])
    assert b"Zo\xc3\xab" in xmp and b'Rating="4"' in xmp
    assert not any(name in xmp for name in (b"Orientation", b"ImageWidth", b"Exposure", b"Pano", b"Thumbnails"))
    if format not in ("webp", "avif"):
        assert np.allclose(image.info["dpi"], 300, atol=0.01)
        assert read_picture(tmp_path / f"b{RESULTS[format][0]}").iptc == IPTC
    assert any("IPTC" in note for note in notes) == (format in ("webp", "avif"))
    if format in ("jpeg", "png"):
        assert dict(read_picture(tmp_path / f"b{RESULTS[format][0]}").text) == {"Comment": "Grüße"} and not notes
    else:
        assert f"its text: {format} has no place for them" in notes
    if format in ("jpeg", "tiff"):
        assert IptcImagePlugin.getiptcinfo(image)[2, 5] == b"title"


def test_text_of_a_png_is_carried_but_not_what_describes_a_thumbnails_file(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "café")
    text.add_itxt("Author", "照片", "ja", "作者")
    text.add_text("Thumb::Image::Width", "7")
    text.add_text("Description", "x" * 3000, zip=True)
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png", pnginfo=text, dpi=(72, 144))
    image, _ = write(tmp_path / "b.png", read_picture(tmp_path / "a.png"), "png")
    assert dict(image.text) == {"Title": "café", "Author": "照片", "Description": "x" * 3000}
    assert np.allclose(image.info["dpi"], (72, 144), atol=0.01)


def test_pixels_per_inch_turn_with_the_picture(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (4, 3)).save(tmp_path / "a.jpg", dpi=(100, 200), exif=exif)
    assert read_picture(tmp_path / "a.jpg").dpi == (200, 100)


def test_broken_xmp_is_noted(tmp_path):
    for xmp in (b"<x:xmpmeta", b"\xff\xfe\0", b"<a>" * 20000):
        Image.new("RGB", (4, 3)).save(tmp_path / "a.jpg", xmp=xmp)
        picture = read_picture(tmp_path / "a.jpg")
        assert picture.xmp is None and len(picture.notes) == 1 and "XMP data cannot be kept" in picture.notes[0]


def chunked(path, *chunks) -> None:
    path.write_bytes(png16(np.full((4, 5, 3), 40000, np.uint16), *chunks))


@pytest.mark.parametrize("transfer, name", [(16, "PQ"), (18, "HLG")])
def test_hdr_of_a_png_is_carried_into_a_png_and_refused_elsewhere(tmp_path, transfer, name):
    cicp = bytes((9, transfer, 0, 1))
    chunked(tmp_path / "a.png", (b"cICP", cicp), (b"mDCV", bytes(24)))
    picture = read_picture(tmp_path / "a.png")
    write_picture(tmp_path / "b.png", picture)
    written = (tmp_path / "b.png").read_bytes()
    assert b"cICP" + cicp in written and b"mDCV" in written and written.index(b"cICP") < written.index(b"IDAT")
    check_colors(picture, "png")
    for format in ("jpeg", "webp", "tiff", "avif"):
        with pytest.raises(ValueError, match=f"HDR in {name}, which is kept in a PNG alone; give format=png"):
            check_colors(picture, format)


def test_gamma_and_primaries_of_a_png_are_carried_and_noted_where_they_cannot_be(tmp_path):
    gamma = struct.pack(">I", 100000)
    primaries = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
    chunked(tmp_path / "a.png", (b"gAMA", gamma), (b"cHRM", primaries))
    picture = read_picture(tmp_path / "a.png")
    write_picture(tmp_path / "b.png", picture)
    assert b"gAMA" + gamma in (written := (tmp_path / "b.png").read_bytes()) and b"cHRM" + primaries in written
    assert any("gAMA" in note for note in write_picture(tmp_path / "b.jpg", picture, format="jpeg"))
    chunked(tmp_path / "a.png", (b"gAMA", struct.pack(">I", 45455)))  # as good as sRGB
    assert write_picture(tmp_path / "b.jpg", read_picture(tmp_path / "a.png"), format="jpeg") == []


def test_an_avif_in_hdr_is_refused_and_others_are_read(tmp_path):
    import imagecodecs

    levels = np.full((16, 16, 3), 600, np.uint16)
    for transfer in (16, 18):
        (tmp_path / "a.avif").write_bytes(
            imagecodecs.avif_encode(levels, bitspersample=10, primaries=9, transfer=transfer, matrix=9)
        )
        for reading in (read_picture, read_header):
            with pytest.raises(ValueError, match=r"HDR in (PQ|HLG), of which 8 bits would be read"):
                reading(tmp_path / "a.avif")
    Image.new("RGB", (16, 16), (200, 30, 60)).save(tmp_path / "b.avif", quality=100)
    assert read_picture(tmp_path / "b.avif").color.shape == (3, 16, 16)


def test_a_gain_map_that_is_left_out_is_noted(tmp_path):
    gain = b'xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/" hdrgm:Version="1.0" '
    xmp = XMP.replace(b"xmlns:crs=", gain + b"xmlns:crs=")
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "gray")]
    frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:], xmp=xmp)
    picture = read_picture(tmp_path / "a.jpg")
    assert picture.notes == ("its HDR gain map is left out; the result is SDR",) and b"hdrgm" not in picture.xmp


@pytest.mark.parametrize("format", RESULTS)
def test_results_that_are_cut_off_are_not_complete_and_other_files_are_refused(tmp_path, format):
    path = tmp_path / "a"
    full_jpeg(tmp_path / "in.jpg")
    write_picture(path, read_picture(tmp_path / "in.jpg"), format=format)
    whole = path.read_bytes()
    assert is_complete(path, format)
    for left in (0, 20, 40, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:left])
        assert not is_complete(path, format), left
    path.unlink()
    assert not is_complete(path, format)
    path.write_bytes(b"somebody else's notes " * 9)
    with pytest.raises(ValueError, match=f"exists and is no {format.upper()}; move it, or give overwrite=true"):
        is_complete(path, format)


def test_the_longest_side_of_a_format_is_checked(tmp_path):
    for format, side in (("webp", 16383), ("jpeg", 65500), ("avif", 65535)):
        check_sides(tmp_path / "a.png", (3, side), format)
        with pytest.raises(ValueError, match=rf"a.png: its result has {side + 1}x3 pixels, .*; give format=png"):
            check_sides(tmp_path / "a.png", (3, side + 1), format)
    check_sides(tmp_path / "a.png", (3, 10**6), "png")


def test_what_people_call_an_image_is_found_and_the_other_files_are_listed(tmp_path):
    jpeg, heic = BytesIO(), b"\0\0\0\x18ftypheic" + bytes(20)
    Image.new("RGB", (4, 3)).save(jpeg, "JPEG")
    for name in ("a.JPG", "b.jfif", "c.jpe", "d.Jpeg", "scan", "photo.jpg.bak"):
        (tmp_path / name).write_bytes(jpeg.getvalue())
    for name in ("e.heic", "f.HEIF", "g.jxl", "h.cr2", "i.psd", "j.svg", "unnamed", "k.tga", "l.jp2"):
        (tmp_path / name).write_bytes(heic)
    for name in ("notes.txt", "clip.mp4", "empty", ".hidden.jpg"):
        (tmp_path / name).write_bytes(b"")
    pictures, others = find_pictures(tmp_path)
    assert [path.name for path in others] == ["clip.mp4", "empty", "notes.txt"]
    assert len(pictures) == 15
    assert [path.name for path in find_images(tmp_path)] == ["a.JPG", "d.Jpeg"]  # training's are as they were


def test_same_is_the_format_of_the_name_where_results_can_have_it(tmp_path):
    names = {
        "a.JPG": ("jpeg", ".JPG"),
        "a.jfif": ("jpeg", ".jfif"),
        "a.tiff": ("tiff", ".tiff"),
        "a.heic": ("png", ".png"),
    }
    names |= {"a": ("png", ".png"), "a.bmp": ("png", ".png"), "a.webp": ("webp", ".webp")}
    assert {name: result_format(tmp_path / name, "same") for name in names} == names
    assert result_format(tmp_path / "a.heic", "jpeg") == ("jpeg", ".jpg")


@pytest.mark.parametrize("suffix", [".heic", ".jpg"])
def test_heic_is_read_by_its_content_upright_and_with_its_metadata(tmp_path, suffix):
    heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = 6, "maker"
    upright = np.zeros((64, 128, 3), np.uint8)
    upright[:, 64:] = 200
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(upright)))
    heif.from_pillow(stored).save(tmp_path / f"a{suffix}", quality=95, exif=exif.tobytes(), xmp=XMP)
    picture = read_picture(tmp_path / f"a{suffix}")
    assert picture.color.shape == (3, 64, 128) and b"Rating" in picture.xmp
    assert abs(picture.color[:, :, 70:].mean() * 255 - 200) < 3 and picture.color[:, :, :60].mean() * 255 < 3
    image, _ = write(tmp_path / "b.png", picture, "png")
    assert (image.getexif()[ExifTags.Base.Make], image.getexif()[ExifTags.Base.Orientation]) == ("maker", 1)


def test_jpeg_xl_is_read_by_its_content(tmp_path):
    pytest.importorskip("pillow_jxl")
    levels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    for name in ("a.jxl", "b.png"):
        Image.fromarray(levels).save(tmp_path / name, "JXL", lossless=True)
        np.testing.assert_array_equal(
            np.rint(read_picture(tmp_path / name).color.permute(1, 2, 0).numpy() * 255), levels
        )


def test_the_extra_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("dit4sr_pl.images.files.find_spec", lambda name: None)
    for name, head in (
        ("a.jpg", b"\0\0\0\x18ftypheic"),
        ("b.jxl", b"\xff\x0a"),
        ("c.jxl", b"\0\0\0\x0cJXL \r\n\x87\n"),
    ):
        (tmp_path / name).write_bytes(head + bytes(30))
        with pytest.raises(
            ValueError, match=rf"{name}: not a readable image \(.* pip install 'dit4sr_pl\[formats\]'\)"
        ):
            read_header(tmp_path / name)


def tiff(path, shape, *tags, dtype=np.uint16, **options) -> None:
    tifffile.imwrite(path, np.ones(shape, dtype), metadata=None, extratags=list(tags), **options)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_of_another_shape_than_its_header_is_refused_before_room_is_made_for_it(tmp_path, dtype):
    Image.fromarray(np.ones((8, 8), dtype)).save(tmp_path / "volume.tif", tiffinfo={32997: 20000})
    with pytest.raises(ValueError, match="a TIFF that holds a volume"):
        read_picture(tmp_path / "volume.tif")
    tiff(tmp_path / "slices.tif", (3, 16, 16), dtype=dtype, photometric="minisblack", volumetric=True, tile=(3, 16, 16))
    with pytest.raises(ValueError, match="slices.tif: not a readable image"):
        read_picture(tmp_path / "slices.tif")
    tiff(tmp_path / "tile.tif", (16, 16), dtype=dtype, photometric="minisblack", tile=(16, 16))
    with tifffile.TiffFile(tmp_path / "tile.tif", mode="r+") as file:
        file.pages[0].tags[322].overwrite(60000)
        file.pages[0].tags[323].overwrite(60000)
    with pytest.raises(ValueError, match="in tiles of 60000x60000"):
        read_picture(tmp_path / "tile.tif")


def test_sixteen_bit_tiffs_of_unknown_kinds_are_refused_in_one_line(tmp_path):
    tiff(tmp_path / "extra.tif", (9, 9, 5), photometric="rgb", extrasamples=["unspecified"] * 2)
    tiff(
        tmp_path / "five.tif",
        (9, 9, 4),
        photometric="minisblack",
        extrasamples=["unspecified"] * 3,
        planarconfig="contig",
    )
    tiff(tmp_path / "lab.tif", (9, 9, 3), photometric="cielab")
    tiff(tmp_path / "dng.tif", (9, 9), (50706, "B", 4, (1, 4, 0, 0), True), photometric="minisblack")
    tiff(tmp_path / "float.tif", (9, 9, 3), dtype=np.float32, photometric="rgb")
    tiff(tmp_path / "thirty.tif", (9, 9, 3), dtype=np.uint32, photometric="rgb")
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=rf"{path.name}: not a readable image \([^\n]+\)$"):
            read_picture(path)


def test_chunks_that_expand_are_not_read_for_colours(tmp_path):
    chunked(tmp_path / "a.png", (b"cICP", bytes(70)), (b"zTXt", b"x\0\0" + zlib.compress(b"hello")))
    picture = read_picture(tmp_path / "a.png")
    assert picture.chunks == () and dict(picture.text) == {"x": "hello"}
