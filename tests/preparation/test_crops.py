"""`prepare stage=crops`: places that are not flat, sizes that are left out, and interrupted, sharded runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from scipy import ndimage

from dit4sr_pl import prepare
from dit4sr_pl.cli.checks import read_shard
from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.data.manifest import read_manifest
from dit4sr_pl.images.files import read_image, write_image
from dit4sr_pl.preparation.crops import channel_gradient, draw_crop


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Three photos of noise of more than 100 KB, one small and one nearly empty file."""
    folder = tmp_path_factory.mktemp("photos")
    for number, (height, width) in enumerate([(400, 500), (390, 420), (700, 300), (300, 400)]):
        image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(number))
        write_image(folder / f"{number}.png", image)
    write_image(folder / "flat.png", torch.full((3, 400, 400), 0.5))
    return folder


@pytest.fixture(scope="module")
def run():
    """Returns a function that runs the stage with overrides and returns its error message; the config is made once."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        given = compose("prepare", ["stage=crops", "data.crop_size=64", "processes=1"])

    def run(*words: str) -> str | None:
        cfg = OmegaConf.merge(given, OmegaConf.from_dotlist(list(words)))
        try:
            prepare.check(cfg)
            prepare.crops(cfg, read_shard(cfg.shard))
        except ValueError as error:
            return str(error)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_channel_gradient_is_opencvs_sobel_of_every_colour(photos):
    image = read_image(photos / "0.png")
    channels = image.double().numpy() / 255
    magnitude = [np.hypot(*(ndimage.sobel(c, axis=axis, mode="mirror") for axis in (0, 1))) for c in channels]
    assert channel_gradient(image) == pytest.approx(np.mean(magnitude), rel=1e-5)


def test_flat_places_are_drawn_again_and_half_of_the_crops_are_mirrored():
    image = torch.zeros(3, 64, 640, dtype=torch.uint8)
    image[0, :, :96] = 255 * (torch.arange(96) % 3 == 0)  # red stripes; grey, they would be below the limit more often
    crops = [draw_crop(image, 64, generator("cpu", seed)) for seed in range(30)]
    assert all(channel_gradient(crop) > 0.2 for crop in crops)
    ramp = torch.arange(0, 256, 4, dtype=torch.uint8).expand(3, 64, 64).clone()
    ramp[:, ::3] = 0  # with these rows it is not flat
    assert channel_gradient(ramp) > 0.2
    mirrored = sum(bool(draw_crop(ramp, 64, generator("cpu", seed))[0, 1, 0]) for seed in range(100))
    assert 30 < mirrored < 70


def test_an_interrupted_or_sharded_run_gives_the_crops_of_an_undisturbed_one(photos, tmp_path, run, capsys):
    words = [f"data.folders=[{photos}]", "crops_per_photo=3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*words, f"crops={whole}") is None
    told = capsys.readouterr().out
    assert "9 crops of 5 photos" in told
    assert "1 photos left out: under 100 KB" in told and "1 photos left out: under 384x384 pixels" in told
    expected = contents(whole)
    assert list(expected) == [f"{photos.name}/{photo}_{k}.png" for photo in range(3) for k in range(3)]
    assert read_manifest(whole / "manifest.parquet").files == list(expected)
    crop, rows = read_image(whole / photos.name / "1_2.png"), read_image(photos / "1.png").unfold(2, 64, 1)
    found = [(rows == each[:, :1, None]).all(-1).all(0).nonzero().tolist() for each in (crop, crop.flip(-1))]
    ((top, left),) = sum(found, [])  # the place of its first row
    cut = read_image(photos / "1.png")[:, top : top + 64, left : left + 64]
    assert torch.equal(cut, crop) or torch.equal(cut.flip(-1), crop)

    assert run(*words, f"crops={parts}", "shard=2/2") is None
    assert not (parts / "manifest.parquet").exists()
    written = sorted(parts.rglob("*.png"))
    written[0].unlink()
    times = {path: path.stat().st_mtime_ns for path in written[1:]}
    for shard in ("2/2", "1/2"):
        assert run(*words, f"crops={parts}", f"shard={shard}") is None
    assert contents(parts) == expected and {path: path.stat().st_mtime_ns for path in times} == times
    assert read_manifest(parts / "manifest.parquet").files == list(expected)


def test_mistakes_are_told_in_one_line(photos, tmp_path, run):
    given = f"data.folders=[{photos}]"
    assert "lies in" in run(given, f"crops={photos}/crops")
    assert "crops_per_photo=0: must be 1 or more" in run(given, "crops_per_photo=0", f"crops={tmp_path}")
    assert "multiple of 16" in run(given, "data.crop_size=100", f"crops={tmp_path}")
    twice = tmp_path / photos.name
    write_image(twice / "1.png", torch.rand(3, 8, 8))
    message = run(f"data.folders=[{photos},{twice}]", f"crops={tmp_path / 'crops'}")
    assert f"{photos}/1.png and {twice}/1.png would have the same crops" in message
