import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from dit4sr_pl.data.demo_photos import CROP, TEST, TRAIN, write_crops, write_demo_photos
from dit4sr_pl.demo import comparison, score_table
from dit4sr_pl.images.files import read_image
from dit4sr_pl.scores.metrics import ImageScore

SCORES = {name: ImageScore(name, reference=True, lower_is_better=False) for name in ("psnr", "ssim")}


@pytest.fixture
def columns():
    torch.manual_seed(0)
    truth = [torch.rand(2, 3, 64, 64), torch.rand(1, 3, 64, 64)]
    noisy = [(images + 0.1 * torch.randn_like(images)).clamp(0, 1) for images in truth]
    return {"bicubic": noisy, "restored": truth, "ground truth": truth}


def test_picture_has_a_row_per_photo_and_a_column_per_method(columns):
    lr = [torch.zeros(2, 3, 16, 16), torch.ones(1, 3, 16, 16)]
    picture = comparison(lr, columns)
    assert picture.shape == (3, 3 * 64, 4 * 64)
    assert picture[:, :128, :64].max() == 0 and picture[:, 128:, :64].min() == 1
    assert torch.equal(picture[:, 128:, -64:], columns["ground truth"][1][0])


def test_table_holds_every_methods_mean_score(columns):
    score = SCORES["psnr"]
    for sr, hr in zip(columns["bicubic"], columns["ground truth"], strict=True):
        score.update(sr, hr)
    mean = score.compute()
    head, _, bicubic, perfect = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in score_table(columns, SCORES).splitlines()
    ]
    assert head == ["", "psnr", "ssim"]
    assert bicubic[:2] == ["bicubic", f"{mean:.3f}"] and perfect[-1] == "1.000"


def test_what_is_tested_is_not_trained_on():
    assert not set(TRAIN) & set(TEST) and {"astronaut", "china"} <= set(TEST)


@pytest.mark.slow
def test_several_processes_may_write_the_photos_at_once(tmp_path):
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(write_demo_photos, [tmp_path] * 2))
    assert {path.stem for path in (tmp_path / "train").iterdir()} == set(TRAIN)


def test_crops_are_parts_of_what_was_held_out_each_another(tmp_path):
    write_crops(tmp_path)
    crops = {path.stem: read_image(path) for path in tmp_path.iterdir()}
    assert {name.rpartition("_")[0] for name in crops} == {*TEST, "page", "text"}
    assert {crop.shape for crop in crops.values()} == {(3, CROP, CROP)}
    assert len({crop.numpy().tobytes() for crop in crops.values()}) == len(crops) >= 40
