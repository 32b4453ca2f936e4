from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dit4sr_pl.comparison.charts import bar_chart, write_chart
from dit4sr_pl.comparison.dataset_table import make_dataset_table
from dit4sr_pl.comparison.rows import Run, make_rows
from dit4sr_pl.comparison.statistics import Resampling
from dit4sr_pl.comparison.strips import GAP, TEXT, most_different, write_strip
from dit4sr_pl.scores.results import read_result
from testing.made_up_scores import draw_scores, made_up, write_run

METHODS = ("Bicubic", "SeeSR", "DiT4SR")


@pytest.fixture
def folders(tmp_path):
    for seed, method in enumerate(METHODS):
        result = made_up(draw_scores(seed), method, seed=seed, pictures="images")
        write_run(tmp_path / method, result)
    return tmp_path


def table_of(folder):
    runs = [Run(folder / method, read_result(folder / method)) for method in METHODS]
    ((dataset, rows),) = make_rows(runs, ["psnr", "ssim"]).items()
    return make_dataset_table(
        dataset, rows, list(METHODS), ["psnr", "ssim"], {"psnr": False}, Resampling(0.95, 100, 0), ""
    )


def test_most_different_crop_against_a_loop():
    draws = np.random.default_rng(0)
    pictures = [Image.fromarray(draws.integers(0, 256, (13, 17), dtype=np.uint8)) for _ in range(3)]
    variance = np.stack([np.asarray(picture, float) for picture in pictures]).var(axis=0)
    boxes = {(x, y): variance[y : y + 5, x : x + 5].mean() for y in range(9) for x in range(13)}
    best = max(boxes, key=boxes.get)
    found, corner = most_different(pictures, 5)
    assert corner == best and found == pytest.approx(boxes[best], rel=1e-5)
    assert most_different(pictures, 40)[1] == (0, 0)


def crops(path, columns: int, crop: int) -> np.ndarray:
    """`(rows, columns, crop, crop, 3)` of a strip."""
    page = np.asarray(Image.open(path))
    width, height = (page.shape[1] - GAP) // columns, crop + TEXT + 2 * GAP
    tops = range(TEXT + 2 * GAP, page.shape[0] - crop, height)
    return np.array([[page[y : y + crop, x : x + crop] for x in range(GAP, page.shape[1], width)] for y in tops])


def test_strip_has_the_same_crops_of_every_run_where_they_differ(folders):
    spot = Image.open(folders / "SeeSR/images/03.png")
    spot.paste("white", (20, 10, 36, 26))
    spot.save(folders / "SeeSR/images/03.png")
    assert list(write_strip(table_of(folders), folders / "strip.png", images=1, crop=16)) == []
    (row,) = crops(folders / "strip.png", 3, 16)
    assert [np.unique(crop).tolist() for crop in row] == [[0], [255], [20]]


def test_images_and_corners_by_name_and_lr_and_hr_beside(folders):
    for name, size, color in (("lr", (10, 10), "red"), ("hr", (40, 40), "blue")):
        (folders / name).mkdir()
        for image in ("04", "01"):
            Image.new("RGB", size, color).save(folders / name / f"{image}.png")
    beside = {"lr": folders / "lr", "hr": folders / "hr"}
    notes = list(
        write_strip(table_of(folders), folders / "s.png", images=["04", "01", "9"], crop=8, at=[3, 5], **beside)
    )
    assert notes == ["RealSR: not in the strip, since not every run has their picture: 9."]
    for row in crops(folders / "s.png", 5, 8):
        assert [crop[4, 4].tolist() for crop in row] == [[255, 0, 0], [0] * 3, [10] * 3, [20] * 3, [0, 0, 255]]
    with pytest.raises(ValueError, match=r"strip.at=\[50, 0\]: outside of a picture of 40x40"):
        list(write_strip(table_of(folders), folders / "s.png", images=1, crop=8, at=[50, 0]))


def test_another_size_is_named(folders):
    Image.new("RGB", (20, 40)).save(folders / "SeeSR/images/02.png")
    with pytest.raises(ValueError, match="SeeSR/images/02.png: 20x40 but 40x40 in .*Bicubic/images/02.png"):
        list(write_strip(table_of(folders), folders / "strip.png", images=1, crop=8))
    (folders / "DiT4SR/images/01.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    with pytest.raises(ValueError, match="DiT4SR/images/01.png: not a readable image"):
        list(write_strip(table_of(folders), folders / "strip.png", images=1, crop=8))


def test_runs_and_images_without_pictures_are_named(folders):
    write_run(folders / "SeeSR", made_up(draw_scores(1), "SeeSR"))
    notes = list(write_strip(table_of(folders), folders / "strip.png", images=2, crop=8))
    assert notes == ["RealSR: no pictures, so not in the strip: SeeSR."]
    assert crops(folders / "strip.png", 2, 8).shape[:2] == (2, 2)
    for picture in (folders / "DiT4SR/images").iterdir():
        picture.unlink()
    (folders / "strip.png").unlink()
    *_, last = write_strip(table_of(folders), folders / "strip.png", images=2, crop=8)
    assert last == "RealSR: no strip, since no image has a picture in every run."
    assert not (folders / "strip.png").exists()


def test_chart_has_a_panel_per_metric_with_bars_intervals_and_the_papers_numbers(folders):
    table = table_of(folders)
    figure = bar_chart(table)
    assert [panel.get_title() for panel in figure.axes] == ["psnr ↑", "ssim"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(METHODS)
    for column, panel in enumerate(figure.axes):
        assert [bar.get_width() for bar in panel.patches] == pytest.approx(table.means[:, column])
        ends = np.array(panel.collections[0].get_segments())[:, :, 0]
        assert ends == pytest.approx(np.stack([table.low[:, column], table.high[:, column]], axis=1))
    assert figure.axes[0].lines[-1].get_xdata() == pytest.approx([np.nan, 25.188, 23.378], nan_ok=True)
    assert len(bar_chart(replace(table, means=table.means * [1, np.nan])).axes) == 1


def test_equal_charts_are_equal_files(folders):
    first, second = (
        [path.read_bytes() for path in write_chart(table_of(folders), folders / name)] for name in ("first", "second")
    )
    assert first == second and first[0].startswith(b"\x89PNG") and first[1].startswith(b"%PDF")
