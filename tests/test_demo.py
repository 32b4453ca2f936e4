import pytest
import torch

from dit4sr_pl.demo import comparison, score_table
from dit4sr_pl.demo_photos import TEST, TRAIN
from dit4sr_pl.metrics import ImageScore

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
    lines = score_table(columns, SCORES).splitlines()
    assert lines[0] == "| | psnr | ssim |" and len(lines) == 4
    assert lines[2].startswith(f"| bicubic | {mean:.3f} |") and lines[3].endswith("1.000 |")


def test_what_is_tested_is_not_trained_on():
    assert not set(TRAIN) & set(TEST) and {"astronaut", "china"} <= set(TEST)
