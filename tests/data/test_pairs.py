"""Given LR/HR pairs in training and validation: aligned crops, mixtures, and what does not fit together."""

import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from torch.nn import functional as F

from dit4sr_pl.cli.benchmarks import name_benchmark
from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.run_identity import differences, resume_identity
from dit4sr_pl.data.datasets import Draw, TrainingCrops, ValidationPairs
from dit4sr_pl.data.module import SuperResolutionData
from dit4sr_pl.data.photo_sets import PairSet
from dit4sr_pl.evaluation.benchmark_sets import BenchmarkSet
from dit4sr_pl.images.files import write_image
from dit4sr_pl.scores.results import read_result
from dit4sr_pl.train import train
from testing.toy_runs import events, toy

SIZES = ((64, 80), (128, 96), (32, 48), (256, 64))  # of HR photos; the third is smaller than a crop


def camera(hr: Tensor) -> Tensor:
    """Returns an LR image that no degradation makes: the darkest pixel of every 4x4."""
    return -F.max_pool2d(-hr[None], 4)[0]


class Grey:
    """A degradation whose LR images are grey, and whose target is the photo at half its brightness."""

    sharpen = None

    def __init__(self):
        self.drawn = []

    def draw(self, seeds, size):
        self.drawn.append(list(seeds))
        return torch.tensor(seeds)

    def __call__(self, images, params):
        return torch.full_like(F.avg_pool2d(images, 4), 0.5), images / 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """RealSR's layout: both images of a pair in one folder, told apart by the ends of their names."""
    folder = tmp_path_factory.mktemp("pairs")
    for number, (height, width) in enumerate(SIZES):
        hr = torch.rand(3, height, width, generator=torch.Generator().manual_seed(number)).mul(255).round() / 255
        write_image(folder / f"Canon/Canon_{number}_HR.png", hr)
        write_image(folder / f"Canon/Canon_{number}_LR4.png", camera(hr))
    (folder / "Canon/Canon_1_HR.txt").write_text("a street")
    return folder


def pairs(folder: Path, **options) -> dict:
    return {"realsr": {"lr": folder, "hr": folder, "lr_suffix": "_LR4", "hr_suffix": "_HR", **options}}


def crops(folder: Path, **options) -> TrainingCrops:
    return TrainingCrops([], 64, seed=0, pairs=pairs(folder), **{"min_gradient": 0} | options)


def test_both_crops_are_of_the_same_place_and_flipped_together(folder):
    samples = [crops(folder)[Draw(index, epoch, 0)] for index in range(len(SIZES)) for epoch in range(8)]
    for sample in samples:
        assert torch.equal(sample["lr"].float(), camera(sample["image"].float())) and sample["paired"]
        assert sample["image"].shape == (3, 64, 64) and sample["lr"].shape == (3, 16, 16)
    assert len({sample["image"].numpy().tobytes() for sample in samples if sample["name"].endswith("_1_HR")}) == 8
    assert {sample["prompt"] for sample in samples} == {"", "a street"}


def test_crops_of_pairs_are_functions_of_the_draw_and_pass_the_gradient_test(folder):
    first, again = (crops(folder, min_gradient=0.2)[Draw(1, 5, position)]["lr"] for position in (0, 77))
    assert torch.equal(first, again) and not torch.equal(first, crops(folder)[Draw(1, 6, 0)]["lr"])


def test_pairs_mix_with_photos_by_weight_and_only_photos_are_degraded(folder, tmp_path):
    for number in range(4):
        write_image(tmp_path / f"{number}.png", torch.rand(3, 64, 64))
    degradation = Grey()
    data = SuperResolutionData(
        tmp_path, [], degradation, 64, None, 4, 0, min_gradient=0.0, pairs=pairs(folder, weight=3.0)
    )
    assert len(data.training) == 4 + 3 * 4
    for _, batch in zip(range(4), data.train_dataloader(), strict=False):
        ready = data.on_after_batch_transfer(data.transfer_batch_to_device(batch, torch.device("cpu"), 0), 0)
        for place, paired in enumerate(batch["paired"].tolist()):
            image = batch["image"][place] / 255
            assert torch.equal(ready["hr"][place], image if paired else image / 2)
            assert torch.equal(ready["lr"][place], camera(image) if paired else torch.full((3, 16, 16), 0.5))
        made = [seed for seed, paired in zip(batch["seed"].tolist(), batch["paired"], strict=True) if not paired]
        assert (degradation.drawn.pop() == made) if made else "degradation" not in ready


def test_a_patchs_number_may_follow_the_suffix(tmp_path):
    for number in (5, 12):
        write_image(tmp_path / f"hr/Canon_21_x4_{number}.png", torch.rand(3, 64, 64))
        write_image(tmp_path / f"lr/Canon_21_x1_{number}.png", torch.rand(3, 16, 16))
    found = PairSet(tmp_path / "lr", tmp_path / "hr", "drealsr", lr_suffix="_x1", hr_suffix="_x4")
    assert [(photo.path.name, photo.lr.name) for photo in found.photos] == [
        ("Canon_21_x4_12.png", "Canon_21_x1_12.png"),
        ("Canon_21_x4_5.png", "Canon_21_x1_5.png"),
    ]


def test_pairs_that_do_not_fit_together_are_named(folder, tmp_path):
    write_image(tmp_path / "hr/a.png", torch.rand(3, 64, 64))
    write_image(tmp_path / "lr/a.png", torch.rand(3, 32, 16))
    with pytest.raises(ValueError, match=r"not 4 times as large .*hr/a.png \(64x64, .*lr/a.png 16x32\)"):
        PairSet(tmp_path / "lr", tmp_path / "hr", "mine").check()
    write_image(tmp_path / "lr/b.png", torch.rand(3, 16, 16))
    with pytest.raises(ValueError, match="no file of the same name on the other side for .*lr/b.png"):
        PairSet(tmp_path / "lr", tmp_path / "hr", "mine")


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory) -> Path:
    """The folder of all benchmarks, in which RealSR has two pairs, 16x16 and 64x64."""
    root = tmp_path_factory.mktemp("root")
    for number in range(2):
        hr = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(number)).mul(255).round() / 255
        write_image(root / f"RealSRVal_crop128/test_HR/{number}.png", hr)
        write_image(root / f"RealSRVal_crop128/test_LR/{number}.png", camera(hr))
    return root


def test_validation_pairs_are_those_of_the_benchmark(benchmark):
    found = BenchmarkSet("realsr", str(benchmark / "RealSRVal_crop128"), "test_LR", "test_HR")
    data = SuperResolutionData(benchmark, [], Grey(), 64, None, 4, 0, min_gradient=0.0, validation=found)
    (batch,) = data.val_dataloader()  # of one size, so they come together
    ready = data.on_after_batch_transfer(batch, 0)
    for place, item in enumerate(found.items(Path())):
        assert torch.equal(ready["lr"][place], item.read_lr()[0]) and torch.equal(ready["hr"][place], item.read_hr()[0])
    assert batch["name"] == ["0", "1"] and data.validation_name == "validation_realsr"
    with pytest.raises(ValueError, match="both given"):
        SuperResolutionData(benchmark, [benchmark], Grey(), 64, validation=found)
    with pytest.raises(ValueError, match="data.validation=x: has no ground truth"):
        ValidationPairs(BenchmarkSet("x", str(benchmark / "RealSRVal_crop128"), "test_LR", None), 0)


@pytest.mark.slow
def test_a_run_trains_on_pairs_and_validates_on_a_benchmark(folder, benchmark, photos, tmp_path):
    options = ["data=pairs", "data.folders=[]", "data.validation_folders=[]", "metrics=[psnr]"]
    options += [f"data.pairs.realsr.{key}={folder}" for key in ("lr", "hr")]
    options += ["data.validation=realsr", f"root={benchmark}", "trainer.max_steps=1", "data.crop_size=64"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("train", [*toy(photos, tmp_path)[1:], *options])
        train(cfg)
    result = read_result(tmp_path)
    assert result.dataset == "validation_realsr" and list(result.scores) == ["0", "1"]
    assert "val/psnr" in events(tmp_path).Tags()["scalars"]


@pytest.fixture(scope="module")
def composed():
    def composed(*overrides: str):
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            return compose("train", ["output=x", *overrides])

    return composed


@pytest.mark.slow
def test_a_benchmark_is_named_with_its_folder_or_the_folder_of_all(composed):
    cfg = composed("data.validation=drealsr", "root=/all")
    name_benchmark(cfg)
    assert "blur" in cfg.data.validation.dropped_words  # captions lose the same sentences as in evaluate
    assert (cfg.data.validation.folder, cfg.data.validation.count) == ("/all/DrealSRVal_crop128", 93)
    cfg.data.validation = {"name": "realsr", "folder": "/here", "captions": "/texts"}
    name_benchmark(cfg)
    assert (cfg.data.validation.folder, cfg.data.validation.lr) == ("/here", "test_LR")
    assert not differences(resume_identity(composed()), resume_identity(cfg))  # a run may be validated otherwise
    for given, message in (("realsr", "give root=FOLDER"), ("set14", "choose one of div2k_val, drealsr")):
        cfg.data.validation, cfg.root = given, None
        with pytest.raises(ValueError, match=re.escape(message)):
            name_benchmark(cfg)


@pytest.mark.slow
def test_scores_against_sharpened_photos_are_named_so(run, tmp_path):
    run("run", "degradation=seesr", "metrics=[psnr]", "data.crop_size=80", "data.validation_crop=80")
    assert read_result(tmp_path / "run").dataset == "validation_sharpened"
    tags = events(tmp_path / "run").Tags()["scalars"]
    assert {"val_sharpened/psnr", "val_sharpened/psnr_bicubic"} <= set(tags) and "val/psnr" not in tags
