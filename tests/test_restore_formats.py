"""Formats and sizes of results, and the count of a folder's files, with bicubic in the network's place."""

import numpy as np
import pytest
from PIL import Image

from dit4sr_pl.restoration.made_with import recorded
from testing.hand_made_png import png16
from testing.small_photos import write_photos
from testing.stand_ins import Bicubic, command


@pytest.fixture
def folder(tmp_path):
    folder = write_photos(tmp_path / "in")
    for name, format in (("5.JPG", "JPEG"), ("6.jfif", "JPEG"), ("7.webp", "WEBP"), ("8.bmp", "BMP")):
        Image.new("RGB", (8, 6), "red").save(folder / name, format)
    return folder


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("format, suffix", [("jpeg", "jpg"), ("webp", "webp"), ("tiff", "tif"), ("avif", "avif")])
def test_results_of_every_format_resume_and_are_made_again_when_they_are_cut_off(
    folder, tmp_path, monkeypatch, capsys, format, suffix
):
    arguments = [f"input={folder}", f"output={tmp_path / 'out'}", f"format={format}"]
    assert command(monkeypatch, Bicubic(), *arguments, "shard=1/2") is None
    assert command(monkeypatch, Bicubic(), *arguments, "shard=2/2") is None
    assert names(tmp_path / "out") == [f"{i}.{suffix}" for i in range(9)]
    with Image.open(tmp_path / f"out/8.{suffix}") as image:
        assert (image.format, image.size) == (format.upper(), (32, 24))
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - (255, 0, 0)).max() <= 6
    whole = (tmp_path / f"out/3.{suffix}").read_bytes()
    (tmp_path / f"out/3.{suffix}").write_bytes(whole[: len(whole) // 2])
    restorer = Bicubic()
    assert command(monkeypatch, restorer, *arguments) is None
    assert [call.names for call in restorer.calls] == [["3"]] and (tmp_path / f"out/3.{suffix}").read_bytes() == whole
    capsys.readouterr()
    assert command(monkeypatch, restorer, *arguments) is None
    assert "nothing to do: 9 of 9 images" in capsys.readouterr().out


def test_same_gives_each_picture_the_format_of_its_name_and_no_two_share_a_result(folder, tmp_path, monkeypatch):
    Image.new("L", (8, 6), 9).save(folder / "0.jpg")
    arguments = [f"input={folder}", f"output={tmp_path / 'out'}", "format=same", "quality=80"]
    assert command(monkeypatch, Bicubic(), *arguments) is None
    expected = {"0.jpg": "JPEG", "5.JPG": "JPEG", "6.jfif": "JPEG", "7.webp": "WEBP", "8.png": "PNG"}
    expected |= {f"{i}.png": "PNG" for i in range(5)}
    found = {}
    for path in (tmp_path / "out").iterdir():
        with Image.open(path) as image:
            found[path.name] = image.format
    assert found == expected
    arguments[1] = f"output={tmp_path / 'k'}"
    assert command(monkeypatch, Bicubic(), *arguments, "keep_suffix=true") is None
    assert names(tmp_path / "k") == sorted([*names(folder)[:-1], "8.bmp.png"])


@pytest.mark.parametrize(
    "target, expected",
    [("size=36", (36, 26)), ("short_side=26", (36, 26)), ("megapixels=0.000936", (36, 26)), ("size=9", (9, 7))],
)
def test_a_size_is_that_of_the_result(folder, tmp_path, monkeypatch, target, expected):
    output = f"output={tmp_path / 'out'}"
    assert command(monkeypatch, Bicubic(), f"input={folder / '1.png'}", output, target) is None
    with Image.open(tmp_path / "out/1.png") as image:
        assert image.size == expected[::-1]
    kind, value = target.split("=")
    assert recorded(tmp_path / "out/1.png").get(kind) in (None, float(value))
    again = command(monkeypatch, Bicubic(), f"input={folder / '1.png'}", output, target)
    assert again is None


def test_a_size_that_is_too_much_for_one_picture_names_it_before_a_network_is_read(folder, tmp_path, monkeypatch):
    restorer = Bicubic()
    message = command(monkeypatch, restorer, f"input={folder / '1.png'}", f"output={tmp_path / 'out'}", "size=4096")
    assert "1.png: size=4096 is 227.6 times its 13x18 pixels; at most 8 times are restored" in message
    assert restorer.loads == 0


@pytest.mark.parametrize(
    "options, reason",
    [
        (["scale=4", "size=64"], "scale=4 and size=64: each sets the size of the results; give one of them"),
        (["short_side=8", "megapixels=1"], "short_side=8 and megapixels=1: each sets the size"),
        (["size=0"], "size=0: must be a whole number of pixels, 1 or more"),
        (["size=12.5"], "size=12.5: must be a whole number"),
        (["megapixels=-1"], "megapixels=-1: must be a number above 0"),
        (["megapixels=true"], "megapixels=True: must be a number above 0"),
        (["format=gif"], "format=gif: choose one of png, jpeg, webp, tiff, avif, same"),
        (["quality=90"], "quality=90: png is lossless; give format=jpeg, webp, avif or same"),
        (["quality=90", "format=tiff"], "quality=90: tiff is lossless"),
        (["quality=101", "format=jpeg"], "quality=101: must be a whole number from 1 to 100"),
        (["png_level=1", "format=jpeg"], "png_level=1: belongs to format=png, not to format=jpeg"),
    ],
)
def test_options_that_contradict_each_other_are_one_line(folder, tmp_path, monkeypatch, options, reason):
    message = command(monkeypatch, Bicubic(), f"input={folder}", f"output={tmp_path / 'out'}", *options)
    assert message.startswith(f"error: {reason}") and "\n" not in message


def test_every_file_of_a_folder_is_in_a_count(folder, tmp_path, monkeypatch, capsys):
    for name in ("0.txt", "list.csv", "film.mp4"):
        (folder / name).write_text("a red car")
    (folder / "raw.NEF").write_bytes(b"II*\0" + bytes(20))
    (folder / "drawing.svg").write_text("<svg/>")
    message = command(monkeypatch, Bicubic(), f"input={folder}", f"output={tmp_path / 'out'}")
    assert message == "error: 2 of 11 images not restored, for the reasons above"
    out, errors = capsys.readouterr()
    assert "9 of 11 images restored" in out and "; no images: 2 files (film.mp4, list.csv)" in out
    assert "raw.NEF: a camera's raw file; develop it and save it as TIFF or PNG" in errors
    assert "drawing.svg: not a readable image (unknown format)" in errors


def test_notes_say_what_a_format_cannot_hold_and_hdr_is_refused_there(folder, tmp_path, monkeypatch, capsys):
    Image.new("RGBA", (8, 6), (255, 0, 0, 0)).save(folder / "clear.png")
    arguments = [f"input={folder / 'clear.png'}", f"output={tmp_path / 'out'}", "format=jpeg"]
    assert command(monkeypatch, Bicubic(), *arguments) is None
    assert "clear.png: its transparency is laid over white, since JPEG has none" in capsys.readouterr().out
    with Image.open(tmp_path / "out/clear.jpg") as image:
        assert np.asarray(image).min() >= 254
    pixels, cicp = np.full((4, 5, 3), 40000, np.uint16), bytes((9, 16, 0, 1))
    (folder / "hdr.png").write_bytes(png16(pixels, (b"cICP", cicp)))
    arguments[0] = f"input={folder / 'hdr.png'}"
    message = command(monkeypatch, Bicubic(), *arguments)
    assert message.endswith("hdr.png: HDR in PQ, which is kept in a PNG alone; give format=png")
    assert command(monkeypatch, Bicubic(), *arguments[:2]) is None
    assert b"cICP" + cicp in (tmp_path / "out/hdr.png").read_bytes()
