import pytest
import torch
from PIL import Image

from dit4sr_pl.evaluation.benchmark_sets import BenchmarkSet, finished_images, read
from dit4sr_pl.images.files import write_image


def write(folder, **sides):
    """Images by name, each a square whose pixels count up."""
    for name, side in sides.items():
        image = torch.arange(side * side).reshape(1, side, side).expand(3, -1, -1) % 256 / 255
        write_image(folder / f"{name}.png", image)
    return folder


def test_pairs_go_by_name_in_folders_below_too_and_in_any_format(tmp_path):
    write(tmp_path / "sr" / "deep", b=8)
    write(tmp_path / "sr", a=8)
    write(tmp_path / "hr", a=8)
    (tmp_path / "hr" / "deep").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "hr" / "deep" / "b.jpg")
    items = finished_images(tmp_path / "sr", tmp_path / "hr")
    found = {item.name: item.hr.relative_to(tmp_path).as_posix() for item in items}
    assert found == {"a": "hr/a.png", "deep/b": "hr/deep/b.jpg"}


def test_every_file_without_a_partner_is_named(tmp_path):
    write(tmp_path / "sr", a=8, b=8, c=8)
    write(tmp_path / "hr", b=8, d=8)
    with pytest.raises(ValueError, match=r"no file of the same name .*/sr/a.png, .*/sr/c.png, .*/hr/d.png;") as error:
        finished_images(tmp_path / "sr", tmp_path / "hr")
    assert "b.png" not in str(error.value)


def test_two_files_of_one_name_are_told(tmp_path):
    write(tmp_path / "sr", a=8)
    Image.new("RGB", (8, 8)).save(tmp_path / "sr" / "a.jpg")
    with pytest.raises(ValueError, match="one name, several files: a.jpg and a.png"):
        finished_images(tmp_path / "sr", None)


def test_every_pair_of_wrong_size_is_named(tmp_path):
    write(tmp_path / "lr", a=4, b=4, c=5)
    write(tmp_path / "hr", a=16, b=15, c=16)
    with pytest.raises(ValueError, match=r"not 4 times .*/hr/b.png \(15x15, .*/hr/c.png \(16x16,") as error:
        BenchmarkSet("x", str(tmp_path), "lr", "hr")
    assert "hr/a.png" not in str(error.value)


def test_turned_photos_are_measured_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for folder, size in (("lr", (2, 3)), ("hr", (8, 12))):
        (tmp_path / folder).mkdir()
        Image.new("RGB", size[::-1]).save(tmp_path / folder / "a.jpg", exif=exif)
    Image.new("RGB", (8, 12)).save(tmp_path / "hr" / "a.jpg")
    (item,) = BenchmarkSet("x", str(tmp_path), "lr", "hr").items(tmp_path)
    assert item.read_lr().shape == (1, 3, 3, 2) and item.read_hr().shape == (1, 3, 12, 8)


def test_both_kinds_may_lie_in_one_folder_as_realsrs(tmp_path):
    write(tmp_path, a_LR4=4, a_HR=16, b_LR4=4, b_HR=16)
    (tmp_path / "a.txt").write_text("A cat.")
    found = BenchmarkSet("x", str(tmp_path), ".", ".", "_LR4", "_HR", captions=str(tmp_path)).items(tmp_path / "sr")
    assert [(item.name, item.lr.name, item.hr.name, item.caption) for item in found] == [
        ("a", "a_LR4.png", "a_HR.png", "A cat."),
        ("b", "b_LR4.png", "b_HR.png", ""),
    ]
    with pytest.raises(ValueError, match="no image there has a name that ends in _LR3"):
        BenchmarkSet("x", str(tmp_path), ".", None, "_LR3")


def test_captions_are_filtered_and_missing_ones_are_told(tmp_path, caplog):
    write(tmp_path, a_LR4=4, b_LR4=4)
    folder = tmp_path / "captions"
    folder.mkdir()
    (folder / "a.txt").write_text("A cat. A blurred dog.")
    captions = {"captions": str(folder), "dropped_words": ["blur"]}
    found = BenchmarkSet("x", str(tmp_path), ".", None, "_LR4", **captions).items(tmp_path)
    assert [item.caption for item in found] == ["A cat.", ""]
    assert f"dataset.captions={folder}: 1 of 2 images have no caption (b)" in caplog.text
    message = "no caption for any image of x, such as a_LR4; there is one of a; captions are named as images are"
    with pytest.raises(ValueError, match=message):
        BenchmarkSet("x", str(tmp_path), ".", None, **captions)
    (folder / "a.txt").unlink()
    with pytest.raises(ValueError, match="no caption for any image of x, such as a; captions are named"):
        BenchmarkSet("x", str(tmp_path), ".", None, "_LR4", **captions)


def test_crops_of_a_pair_show_the_same_place(tmp_path):
    for side in (7, 8):  # off the centre by half an LR pixel, and not
        lr = torch.rand(1, 3, side, side + 3, generator=torch.Generator().manual_seed(0))
        write_image(tmp_path / "lr" / "a.png", lr[0])
        write_image(tmp_path / "hr" / "a.png", lr[0].repeat_interleave(4, 1).repeat_interleave(4, 2))
        (item,) = BenchmarkSet("x", str(tmp_path), "lr", "hr", crop=16).items(tmp_path)
        small, large = item.read_lr(), item.read_hr()
        assert small.shape == (1, 3, 4, 4) and large.shape == (1, 3, 16, 16)
        torch.testing.assert_close(large[..., ::4, ::4], small, atol=0, rtol=0)
        left = round((side - 1) / 2)
        assert torch.equal(small, read(tmp_path / "lr" / "a.png")[..., 2:6, left : left + 4])


@pytest.mark.parametrize("crop, message", [(18, "multiple of 4"), (20, r"crop=20: more than .*/lr/a.png; lower it$")])
def test_a_crop_that_cannot_be_is_told(tmp_path, crop, message):
    write(tmp_path / "lr", a=4, b=5)
    with pytest.raises(ValueError, match=message):
        BenchmarkSet("x", str(tmp_path), "lr", None, crop=crop)


def test_restored_images_fit_the_set_that_they_were_made_from(tmp_path):
    write(tmp_path / "lr", a=4)
    write(tmp_path / "hr", a=16)
    write(tmp_path / "sr", a=15)
    benchmark = BenchmarkSet("x", str(tmp_path), "lr", "hr")
    with pytest.raises(ValueError, match=r"not 4 times .*/sr/a.png \(15x15"):
        benchmark.finished(tmp_path / "sr")
    write(tmp_path / "sr", a=16)
    (item,) = benchmark.finished(tmp_path / "sr")
    assert (item.sr, item.hr) == (tmp_path / "sr" / "a.png", tmp_path / "hr" / "a.png")
    with pytest.raises(ValueError, match="not as large as dataset.crop=8: .*sr/a.png"):
        BenchmarkSet("x", str(tmp_path), "lr", "hr", crop=8).finished(tmp_path / "sr")
