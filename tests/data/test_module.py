import itertools
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning import LightningModule, Trainer
from omegaconf import OmegaConf
from scipy import ndimage
from torch.nn import functional as F

from dit4sr_pl.data.datasets import Draw, TrainingCrops, mean_gradient
from dit4sr_pl.data.module import PositionSampler, SuperResolutionData
from dit4sr_pl.images.files import read_image, write_image

CONF = Path(__file__).parents[2] / "conf"


class AveragePooling:
    """A degradation whose only parameter is a brightness per image, drawn from its seed."""

    def draw(self, seeds, size):
        return torch.tensor([seed % 1000 / 1000 for seed in seeds])

    def __call__(self, images, params):
        return F.avg_pool2d(images, 4) * params.to(images)[:, None, None, None], images


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Ten photos of noise, from 40 to 94 pixels wide, every other one with a caption."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(10):
        write_image(folder / f"{i:02}.png", torch.rand(3, 50, 40 + 6 * i, generator=torch.Generator().manual_seed(i)))
        if i % 2:
            (folder / f"{i:02}.txt").write_text(f"photo\n number {i}\n")
    return folder


def super_resolution_data(folder, **options) -> SuperResolutionData:
    defaults = {"crop_size": 32, "validation_crop": 32, "batch_size": 4, "num_workers": 0, "min_gradient": 0.0}
    return SuperResolutionData(folder, folder, AveragePooling(), **defaults | options)


def take(loader, count: int) -> list[dict]:
    return list(itertools.islice(loader, count))


def same(batches: list[dict], others: list[dict]) -> bool:
    return len(batches) == len(others) and all(
        torch.equal(a["image"], b["image"])
        and a["seed"].tolist() == b["seed"].tolist()
        and a["position"].tolist() == b["position"].tolist()
        and (a["prompt"], a["name"]) == (b["prompt"], b["name"])
        for a, b in zip(batches, others, strict=True)
    )


# Samples


def test_sample_is_a_crop_of_its_photo(folder):
    dataset = TrainingCrops(folder, 32, seed=0, min_gradient=0, empty_prompt_probability=0)
    for index in range(10):
        sample = dataset[Draw(index, 3, 77)]
        photo = read_image(folder / f"{index:02}.png")
        windows = photo.unfold(1, 32, 1).unfold(2, 32, 1)  # (3, rows, columns, 32, 32): every crop there is
        crops = (sample["image"], sample["image"].flip(-1))
        assert any((windows == crop[:, None, None]).all(-1).all(-1).all(0).any() for crop in crops)
        assert (sample["name"], sample["position"]) == (f"{index:02}", 77)
        assert sample["prompt"] == (f"photo number {index}" if index % 2 else "")


def test_sample_depends_on_seed_index_and_epoch_but_not_on_position(folder):
    def sample(draw, seed=0):
        found = TrainingCrops(folder, 32, seed, min_gradient=0)[draw]
        return found["image"].numpy().tobytes(), found["seed"], found["prompt"]

    assert sample(Draw(5, 1, 0)) == sample(Draw(5, 1, 99))
    others = [sample(Draw(5, 2, 0)), sample(Draw(6, 1, 0)), sample(Draw(5, 1, 0), seed=1)]
    assert len({image for image, _, _ in [sample(Draw(5, 1, 0)), *others]}) == 4
    assert len({seed for _, seed, _ in [sample(Draw(5, 1, 0)), *others]}) == 4
    assert all(0 <= seed < 2**63 for _, seed, _ in others)


def test_shares_of_flips_and_empty_prompts(folder, tmp_path):
    ramp = torch.linspace(0, 1, 32).expand(3, 32, 32)
    write_image(tmp_path / "ramp.png", ramp)
    (tmp_path / "ramp.txt").write_text("a ramp")
    samples = [TrainingCrops(tmp_path, 32, 0, min_gradient=0)[Draw(0, epoch, 0)] for epoch in range(400)]
    flipped = np.mean([int(s["image"][0, 0, 0]) > 127 for s in samples])
    empty = np.mean([s["prompt"] == "" for s in samples])
    assert abs(flipped - 0.5) < 0.1 and abs(empty - 0.2) < 0.08
    unflipped = TrainingCrops(tmp_path, 32, 0, flip=False, min_gradient=0)
    assert all(torch.equal(unflipped[Draw(0, e, 0)]["image"], read_image(tmp_path / "ramp.png")) for e in range(9))


def test_small_image_is_reflected_to_the_crop_size(tmp_path):
    write_image(tmp_path / "small.png", torch.rand(3, 20, 9, generator=torch.Generator().manual_seed(0)))
    (sample,) = [TrainingCrops(tmp_path, 32, 0, flip=False, min_gradient=0)[Draw(0, 0, 0)]]
    small = read_image(tmp_path / "small.png").numpy()
    rows, columns = ([min(i % (2 * n - 2), -i % (2 * n - 2)) for i in range(32)] for n in (20, 9))
    np.testing.assert_array_equal(sample["image"], small[:, rows][:, :, columns])


def test_mean_gradient_is_the_sobel_magnitude_of_grey(folder):
    image = read_image(folder / "03.png")
    grey = np.tensordot([0.299, 0.587, 0.114], image.numpy() / 255, axes=1)
    magnitude = np.hypot(*(ndimage.sobel(grey, axis=axis, mode="nearest") for axis in (0, 1)))
    assert math.isclose(mean_gradient(image), magnitude.mean(), rel_tol=1e-5)


def test_flat_crops_are_drawn_again(tmp_path):
    image = torch.full((3, 32, 320), 0.5)
    image[..., :40] = torch.rand(3, 32, 40, generator=torch.Generator().manual_seed(0))
    write_image(tmp_path / "mostly_flat.png", image)

    def textured(**options):
        dataset = TrainingCrops(tmp_path, 32, 0, **options)
        return sum(mean_gradient(dataset[Draw(0, e, 0)]["image"]) >= 0.2 for e in range(60))

    assert textured(min_gradient=0) < 25
    assert textured(min_gradient=0.2, redraws=50) == 60
    assert textured(min_gradient=0.2, redraws=0) == textured(min_gradient=0)


def test_several_folders_follow_each_other_and_names_are_relative(folder, tmp_path):
    write_image(tmp_path / "sub/last.png", torch.zeros(3, 8, 8))
    dataset = TrainingCrops([folder, str(tmp_path)], 16, 0, min_gradient=0)
    assert [photo.name for photo in dataset.photos] == [f"{i:02}" for i in range(10)] + ["sub/last"]


def test_samples_are_pinned(folder):
    """A run can only be replayed if these never change."""
    for data in (
        super_resolution_data(folder),
        SuperResolutionData(
            [], [], AveragePooling(), 32, None, 4, 0, min_gradient=0.0, sets={"a": {"folder": folder, "weight": 1}}
        ),
    ):
        batches = take(data.train_dataloader(), 3)
        order = [5, 7, 8, 2, 4, 9, 3, 6, 0, 1, 3, 0]
        assert sum((batch["name"] for batch in batches), []) == [f"{i:02}" for i in order]
        assert batches[2]["seed"].tolist()[2:] == [5490874315290678854, 554281402648237845]
        assert [int(batch["image"].sum()) for batch in batches] == [1557834, 1556353, 1561209]
        assert batches[0]["prompt"] == ["photo number 5", "", "", ""]


# Order


def draws(count: int, **options) -> list[list[Draw]]:
    return take(PositionSampler(length=10, seed=0, **options), count)


def test_every_epoch_holds_every_image_once_in_an_order_of_its_own():
    flat = sum(draws(10, batch_size=3), [])
    assert [draw.position for draw in flat] == list(range(30))
    epochs = [[draw.index for draw in flat if draw.epoch == epoch] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_resumed_order_equals_the_uninterrupted_one():
    assert draws(6, batch_size=4, start=lambda: 16) == draws(10, batch_size=4)[4:]


def test_two_devices_share_the_batches_of_one():
    first, second = (draws(5, batch_size=4, rank=rank, world_size=2) for rank in (0, 1))
    assert [a + b for a, b in zip(first, second, strict=True)] == draws(5, batch_size=8)


@pytest.mark.parametrize("workers", [1, 2])
def test_weighted_sets_resume_and_do_not_depend_on_the_number_of_workers(folder, workers):
    sets = {"a": {"folder": folder, "weight": 0.5, "limit": 6}, "b": {"folder": folder, "weight": 1.5}}
    here = super_resolution_data([], sets=sets)
    assert len(here.training) == 18
    batches = take(here.train_dataloader(), 12)
    there = super_resolution_data([], sets=sets, num_workers=workers)
    there.trainer = trainer(global_step=3)
    assert same(take(there.train_dataloader(), 9), batches[3:])


@pytest.mark.parametrize("workers", [1, 2])
def test_samples_do_not_depend_on_the_number_of_workers(folder, workers):
    here = take(super_resolution_data(folder).train_dataloader(), 5)
    there = take(super_resolution_data(folder, num_workers=workers).train_dataloader(), 5)
    assert same(here, there)


# The data module


def trainer(**options) -> SimpleNamespace:
    defaults = {"global_step": 0, "global_rank": 0, "world_size": 1, "accumulate_grad_batches": 1, "overfit_batches": 0}
    return SimpleNamespace(**defaults | options)


def test_training_starts_at_the_images_seen(folder):
    data = super_resolution_data(folder)
    batches = take(data.train_dataloader(), 6)
    data.trainer = trainer(global_step=2, accumulate_grad_batches=2)
    assert same(take(data.train_dataloader(), 2), batches[4:])
    halves = super_resolution_data(folder, batch_size=2)
    halves.trainer = trainer(global_step=3, global_rank=1, world_size=2)
    (half,) = take(halves.train_dataloader(), 1)
    assert torch.equal(half["image"], batches[3]["image"][2:])


def test_validation_images_are_shared_out_without_duplicates(folder):
    data = super_resolution_data(folder)
    names = []
    for rank in range(3):
        data.trainer = trainer(global_rank=rank, world_size=3)
        names += [name for batch in data.val_dataloader() for name in batch["name"]]
    assert sorted(names) == [f"{i:02}" for i in range(10)]
    data.trainer = trainer(world_size=11)
    with pytest.raises(ValueError, match="10 validation images for 11 devices"):
        data.val_dataloader()


def test_validation_samples_are_fixed(folder, tmp_path):
    data = super_resolution_data(folder, validation_limit=3)
    (first,), (again,) = (list(data.val_dataloader()) for _ in range(2))
    assert same([first], [again])
    assert torch.equal(first["image"][2], read_image(folder / "02.png")[:, 9:41, 10:42])
    assert first["prompt"] == ["", "photo number 1", ""]
    write_image(tmp_path / "02.png", torch.zeros(3, 32, 32))
    (alone,) = super_resolution_data(tmp_path).val_dataloader()
    assert alone["seed"][0] == first["seed"][2] != first["seed"][0]  # of the name, not of the place


@pytest.mark.parametrize("files", [("a/0001.png", "b/0001.png"), ("a/0001.png", "a/0001.jpg")])
def test_validation_images_of_one_name_are_refused_with_both_named(folder, tmp_path, files):
    for file in files:
        write_image(tmp_path / file, torch.zeros(3, 32, 32)) if file.endswith("png") else shutil.copy(
            tmp_path / files[0], tmp_path / file
        )
    folders = sorted({str(tmp_path / Path(file).parent) for file in files})
    with pytest.raises(ValueError, match=f"{files[0]} and .*{files[1]} are two|{files[1]} and .*{files[0]} are two"):
        SuperResolutionData(folder, folders, AveragePooling(), crop_size=32)
    SuperResolutionData(folder, folders, AveragePooling(), crop_size=32, validation_limit=1)


def test_a_broken_caption_is_named_before_the_first_step(folder, tmp_path):
    for number in range(6):
        write_image(tmp_path / f"{number}.png", torch.zeros(3, 32, 32))
    for number in (2, 3, 4, 5):
        (tmp_path / f"{number}.txt").write_bytes("Café".encode("cp1252"))
    data = SuperResolutionData(folder, tmp_path, AveragePooling(), crop_size=32)
    with pytest.raises(ValueError, match=r"2.txt: the caption is not UTF-8 .*; .*3.txt: .*4.txt: .*; and 1 more$"):
        data.prepare_data()


def test_whole_validation_images_come_one_by_one_cut_to_tokens(folder):
    data = super_resolution_data(folder, validation_crop=None)
    assert [tuple(batch["image"].shape) for batch in data.val_dataloader()] == [
        (1, 3, 48, (40 + 6 * i) // 16 * 16) for i in range(10)
    ]


def test_batch_is_degraded_on_its_device(folder):
    data = super_resolution_data(folder)
    (batch,) = take(data.train_dataloader(), 1)
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved["image"].is_meta and not moved["seed"].is_meta and not moved["position"].is_meta
    ready = data.on_after_batch_transfer(batch, 0)
    images = batch["image"] / 255
    lr, hr = AveragePooling()(images, AveragePooling().draw(batch["seed"].tolist(), (32, 32)))
    assert ready["lr"].dtype == ready["hr"].dtype == torch.float32
    assert torch.equal(ready["lr"], lr) and torch.equal(ready["hr"], hr) and torch.equal(ready["image"], images)
    assert ready["degradation"].shape == (4,) and ready["name"] == batch["name"]


def test_arguments_are_checked_before_any_worker_starts(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        super_resolution_data(tmp_path / "absent")
    with pytest.raises(ValueError, match="no images in this folder"):
        super_resolution_data(tmp_path)
    with pytest.raises(ValueError, match="name at least one"):
        super_resolution_data([])
    with pytest.raises(ValueError, match="crop_size=36: must be a positive multiple of 16"):
        super_resolution_data(folder, crop_size=36)
    assert SuperResolutionData(folder, [], AveragePooling()).val_dataloader() == []


# Under Lightning


class Recorder(LightningModule):
    """Trains one number and writes down the positions and LR means it sees."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch["position"].tolist(), batch["lr"].mean().item()))
        return (self.weight - batch["lr"].mean()) ** 2

    def validation_step(self, batch, batch_idx):
        self.validated += batch["name"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data, tmp_path, steps: int, checkpoint=None, **options) -> tuple[Recorder, Trainer]:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    validation = {"check_val_every_n_epoch": None, "val_check_interval": 2, "num_sanity_val_steps": 0}
    model = Recorder()
    settings = quiet | validation | {"enable_checkpointing": False, "default_root_dir": tmp_path} | options
    runner = Trainer(max_steps=steps, **settings)
    runner.fit(model, data, ckpt_path=checkpoint)
    return model, runner


LIGHTNING_NOISE = ("ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning")
under_lightning = pytest.mark.filterwarnings(*LIGHTNING_NOISE)


@under_lightning
@pytest.mark.parametrize("accumulate", [1, 2])
def test_run_resumed_from_a_checkpoint_sees_what_the_uninterrupted_run_sees(folder, tmp_path, accumulate):
    options = {"accumulate_grad_batches": accumulate}
    whole, _ = fit(super_resolution_data(folder), tmp_path, 4, **options)
    part, runner = fit(super_resolution_data(folder), tmp_path, 2, **options)
    runner.save_checkpoint(tmp_path / "part.ckpt")
    rest, _ = fit(super_resolution_data(folder), tmp_path, 4, checkpoint=tmp_path / "part.ckpt", **options)
    assert len(part.seen) == 2 * accumulate
    assert part.seen + rest.seen == whole.seen
    assert torch.equal(rest.weight, whole.weight)
    assert part.validated == [f"{i:02}" for i in range(10)] * accumulate


@under_lightning
@pytest.mark.parametrize("workers", [0, 1])
def test_lightning_epochs_continue_the_order(folder, tmp_path, workers):
    """Lightning restarts the loader at each of its epochs; the samples must not start over."""
    data = super_resolution_data(folder, num_workers=workers)
    model, _ = fit(data, tmp_path, 6, limit_train_batches=2, val_check_interval=None, limit_val_batches=0)
    assert sum((positions for positions, _ in model.seen), []) == list(range(24))


# Configuration


def compose_data(*overrides: str) -> SuperResolutionData:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(overrides=list(overrides))
    OmegaConf.set_struct(cfg, False)
    cfg.seed, cfg.degradation = 3, {"_target_": f"{__name__}.AveragePooling"}
    data = instantiate(cfg.data)
    assert data.seed == data.training.seed == 3 and type(data.degradation).__name__ == "AveragePooling"
    return data


def test_folder_configuration_has_the_papers_numbers(folder):
    data = compose_data("+data=folder", f"data.folders=[{folder}]")
    training = data.training
    assert (training.crop_size, training.min_gradient, training.redraws) == (512, 0.2, 50)
    assert training.empty_prompt_probability == 0.2 and data.batch_size == 8 and data.validation is None


def test_paper_configuration_joins_the_sets_that_are_given(folder):
    sets = [f"data.sets.{name}.folder={folder}" for name in ("div2k", "ffhq", "nkusr8k")]
    data = compose_data("+data=paper", *sets, "data.sets.ffhq.limit=3", "data.sets.nkusr8k.weight=2")
    assert [(s.name, len(s.photos)) for s in data.training.sets] == [("div2k", 10), ("ffhq", 3), ("nkusr8k", 10)]
    assert len(data.training) == 33 and data.training.crop_size == 512 and data.validation is None


def test_demo_configuration_reads_the_photos_it_writes(tmp_path, monkeypatch):
    def two_photos(photos):
        write_image(Path(photos, "train/a.png"), torch.zeros(3, 32, 32))
        write_image(Path(photos, "test/b.png"), torch.zeros(3, 32, 32))

    monkeypatch.setattr("dit4sr_pl.data.demo_photos.write_demo_photos", two_photos)
    data = compose_data("+data=demo", f"data.photos={tmp_path}")
    assert [photo.name for photo in data.training.photos + data.validation.photos] == ["a", "b"]
    assert (data.training.crop_size, data.training.min_gradient) == (128, 0.0)
