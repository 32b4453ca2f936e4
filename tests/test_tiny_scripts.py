"""The scripts that make the small pair, at toy size: photos, base, latent pairs, LR stream, release, pack."""

import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny_base
import tiny_pack
import tiny_pairs
import tiny_photos
import tiny_rebase
import tiny_release
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.files import ASSETS
from dit4sr_pl.data.latents import LatentPairs
from dit4sr_pl.images.files import find_images, image_size, read_image
from dit4sr_pl.model import DiT4SRTransformer, Variant, load_part, save_part
from dit4sr_pl.model.trained_part import base_of, part_of
from dit4sr_pl.train import train
from testing.student_files import STUDENTS, write_student
from testing.toy_runs import TOY_SD3

TOY_CONFIG = json.loads((TOY_SD3 / "transformer/config.json").read_text())


def call(module: ModuleType, **options) -> None:
    """Runs a script's `main()` with options."""
    words = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, *map(str, value if isinstance(value, list) else [value])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script", *words])
        module.main()


@pytest.fixture(scope="module")
def tiles(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiles")
    rng = np.random.default_rng(0)
    for photo_set, count in (("train", 3), ("held_out", 2)):
        (folder / photo_set).mkdir()
        for number in range(count):
            small = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
            small.resize((256, 256), Image.Resampling.BICUBIC).save(folder / photo_set / f"{number:03d}_256_0_0.png")
    return folder


@pytest.fixture(scope="module")
def pairs(tiles, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    call(tiny_pairs, photos=tiles / "train", pipeline=TOY_SD3, output=folder, workers=0, device="cpu")
    return folder


def test_pairs_are_made_of_squares_of_tiles(tiles):
    whole, cut = (tiny_pairs.Pairs(tiles / "train", side, ["light:1"], 1, 0) for side in (256, 128))
    assert len(cut) == 4 * len(whole)
    for place, (rows, columns) in enumerate([(0, 0), (0, 128), (128, 0), (128, 128)]):
        square = whole.tiles[0, :, rows : rows + 128, columns : columns + 128]
        assert torch.equal(cut.tiles[place], square)
    lr, hr = cut[1]
    assert lr.shape == (3, 32, 32) and torch.equal(hr, cut.tiles[1] / 255)


@pytest.fixture
def train_base(tiles, tmp_path, monkeypatch) -> Callable:
    """Returns a function that trains a toy base for the given minutes, with its state in `tmp_path`."""
    monkeypatch.setattr(tiny_base, "CONFIG", {key: TOY_CONFIG[key] for key in tiny_base.CONFIG})
    options = dict(photos=tiles, pipeline=TOY_SD3, state=tmp_path, tokens=64, device="cpu", no_compile=True)
    return lambda minutes, **more: call(tiny_base, minutes=minutes, **options, **more)


@pytest.mark.slow
def test_a_photo_is_cut_where_it_is_sharp_and_flat_tiles_are_rare(tmp_path):
    rng = np.random.default_rng(0)
    detail = rng.integers(0, 256, (1000, 2000), dtype=np.uint8)
    detail[:, 700:] = 128
    photo = Image.fromarray(detail).convert("RGB")
    (tmp_path / "packages/sharp").mkdir(parents=True)
    (tmp_path / "packages/soft_release").mkdir()
    photo.save(tmp_path / "packages/sharp/a.png", compress_level=1)
    photo.resize((500, 250)).resize((2000, 1000)).save(tmp_path / "packages/soft_release/b.png", compress_level=1)
    (tmp_path / "list.txt").write_text("train sharp a.png\nheld_out soft/release b.png\n")
    call(tiny_photos, output=tmp_path / "tiles", packages=tmp_path / "packages", list=tmp_path / "list.txt")

    names = {
        part: sorted(path.name for path in (tmp_path / "tiles" / part).iterdir()) for part in ("train", "held_out")
    }
    largest = {part: max(int(name.split("_")[1]) for name in found) for part, found in names.items()}
    assert names["train"][0].startswith("000_") and largest["train"] == 1365 and largest["held_out"] <= 910
    everything = sum(len(tiny_photos.cuts(side // 2)) * len(tiny_photos.cuts(side)) for side in (1365, 910, 455))
    assert len(names["train"]) < everything
    assert {image_size(path) for path in (tmp_path / "tiles").rglob("*.png")} == {(256, 256)}


@pytest.mark.slow
def test_the_base_resumes_and_its_decay_ends_in_a_pipeline(train_base, tmp_path, capsys):
    train_base(0.003)
    first = torch.load(tmp_path / "constant.pt", weights_only=True)
    (tmp_path / "constant_average.pt").unlink()  # it need not travel
    train_base(0.003)
    second = torch.load(tmp_path / "constant.pt", weights_only=True)
    assert 0 < first["step"] < second["step"] and second["progress"] == 0

    train_base(0.003, phase="decay")
    left = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert left == ["constant.pt", "constant_average.pt", "held_out.pt", "train.pt"]
    assert torch.load(tmp_path / "constant.pt", weights_only=True)["step"] == second["step"]
    assert "decay step" in (said := capsys.readouterr().out) and "0.9: " in said
    transformer = Backbone(str(tmp_path / "tiny-sd3"), "float32", 8).transformer
    assert str(TOY_SD3) not in (tmp_path / "tiny-sd3/transformer/config.json").read_text()
    assert transformer.config.num_layers == 2 and all(weight.isfinite().all() for weight in transformer.parameters())


def test_a_decay_takes_the_learning_rate_to_zero_and_resumes_on_its_way(train_base, tmp_path, monkeypatch):
    rates, clock = [], iter(range(10_000))
    monkeypatch.setattr(tiny_base.time, "perf_counter", lambda: next(clock))

    def train_step(training: tiny_base.Training) -> torch.Tensor:
        rates.append(training.optimizer.param_groups[0]["lr"])
        training.step += 1
        return torch.zeros(())

    def killed(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_base.Training, "train_step", train_step)
    monkeypatch.setattr(tiny_base.Training, "score", lambda _: "")
    monkeypatch.setattr(tiny_base, "WARM_UP", 1)
    monkeypatch.setattr(tiny_base, "SAVE_EVERY", 5)
    monkeypatch.setattr(tiny_base, "write_pipeline", killed)
    with pytest.raises(KeyboardInterrupt):
        train_base(0.5, phase="decay")
    assert rates[0] == 0 and rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[1] > 0.8e-3 and rates[-1] < 0.1e-3
    done = torch.load(tmp_path / "decay.pt", weights_only=True)["progress"]
    rates.clear()
    with pytest.raises(KeyboardInterrupt):
        train_base(0.5, phase="decay")
    assert 0 < max(rates) <= 1e-3 * (1 - done)


def test_pairs_are_the_latents_of_tiles_and_of_their_mirror_images(tiles, pairs):
    coder = Backbone(str(TOY_SD3), "float32", 8).coder
    read = LatentPairs([pairs], None, 256, seed=0, empty_prompt_probability=0, in_memory=True)
    assert len(read) == 6 and {latents.dtype for latents in read.memory.values()} == {torch.float16}
    hr = torch.stack([read_image(path) for path in sorted((tiles / "train").iterdir())]) / 255
    expected = coder.encode(torch.cat([hr, hr.flip(-1)]))
    off = {kind: (latents.float() - expected).abs().mean() / expected.std() for kind, latents in read.memory.items()}
    assert off["latent_hr"] < 0.01 and off["latent_lr"] > 0.05


@pytest.mark.slow
def test_files_of_pairs_that_exist_are_kept_and_others_do_not_depend_on_them(tiles, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_pairs, "PIECE", 2)
    monkeypatch.setattr(tiny_pairs, "BATCH", 2)
    options = dict(photos=tiles / "train", pipeline=TOY_SD3, output=tmp_path, workers=0, device="cpu")
    call(tiny_pairs, **options)
    files = sorted(tmp_path.rglob("*.pt"))
    assert len(files) == 6
    before = {path: path.read_bytes() for path in files}
    files[1].unlink()
    times = {path: path.stat().st_mtime_ns for path in files if path.stem != files[1].stem}
    call(tiny_pairs, **options)
    assert {path: path.read_bytes() for path in files} == before
    assert times == {path: path.stat().st_mtime_ns for path in times}


@pytest.mark.slow
def test_the_lr_stream_trains_on_pairs_until_its_time_is_over_and_resumes(pairs, tmp_path):
    def run(*words: str) -> None:
        overrides = ["experiment=tiny_dit4sr", f"data.latents=[{pairs}]", f"model.backbone.name={TOY_SD3}", *words]
        overrides += [f"output={tmp_path}", "data.batch_size=4", "model.compile=false", "~callbacks.progress"]
        overrides += ["trainer.precision=32-true", "trainer.log_every_n_steps=1", "+trainer.enable_progress_bar=false"]
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            train(compose("train", overrides))

    run("trainer.max_time=00:00:00:01")
    step = int((tmp_path / "checkpoints/last.ckpt").resolve().stem)
    assert step > 0 and (tmp_path / "lr_stream.safetensors").exists()
    run("trainer.max_time=00:00:10:00", f"trainer.max_steps={step + 1}")
    assert (tmp_path / "checkpoints/last.ckpt").resolve().stem == f"{step + 1:07d}"


def test_an_lr_stream_goes_over_to_another_base_and_into_a_package(toy_backbone, tmp_path):
    net = DiT4SRTransformer(toy_backbone.transformer, Variant(injection_scale=1.0))
    save_part(part_of(net, base_of(net, "toy")), tmp_path / "trained.safetensors")
    shutil.copytree(TOY_SD3, tmp_path / "base")
    other = Backbone(str(tmp_path / "base"), "float32", 8).transformer
    with torch.no_grad():
        other.proj_out.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "base/transformer")
    start = tmp_path / "start.safetensors"
    call(tiny_rebase, trained=tmp_path / "trained.safetensors", base=tmp_path / "base", output=start)
    with pytest.raises(ValueError, match="trained over"):
        call(tiny_release, trained=start, base=TOY_SD3, output=tmp_path / "package/tiny-dit4sr")

    call(tiny_release, trained=start, base=tmp_path / "base", output=tmp_path / "package/tiny-dit4sr")
    released = load_part(tmp_path / "package/tiny-dit4sr/lr_stream.safetensors")
    before = load_part(tmp_path / "trained.safetensors")
    shipped = load_part(ASSETS / "tiny-dit4sr/lr_stream.safetensors")
    assert released.network_config == shipped.network_config and released.base["name"] == "tiny-sd3"
    assert released.base["fingerprint"] != before.base["fingerprint"]
    assert all(torch.equal(released.state[name], before.state[name].half()) for name in before.state)
    assert (tmp_path / "package/tiny-sd3/transformer/config.json").exists()


def test_a_student_goes_into_a_package_with_the_scale_that_it_was_trained_with(toy_backbone, tmp_path):
    file = write_student(tmp_path, toy_backbone, STUDENTS["1 step"], injection_scale=0.7)
    call(tiny_release, trained=file, base=TOY_SD3, output=tmp_path / "package/tiny-student-1")
    released, before = load_part(tmp_path / "package/tiny-student-1/lr_stream.safetensors"), load_part(file)
    assert released.network_config == before.network_config
    assert released.network_config["variant"]["injection_scale"] == 0.7


@pytest.mark.slow
def test_a_pack_holds_a_tile_of_every_photo_within_its_limit(tiles, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiny_pack, "tracked_files", lambda without: [])
    call(tiny_pack, photos=tiles, output=tmp_path, limit=0.5, no_wheels=True)
    assert "MiB  together, of 0.5" in capsys.readouterr().out
    assert len(find_images(tmp_path / "photos/train")) == 3
    a, b = (read_image(next(folder.glob("train/000_256_0_0.*"))).float() for folder in (tiles, tmp_path / "photos"))
    assert (a - b).abs().mean() < 3
    one = (tmp_path / "photos/train/000_256_0_0.avif").stat().st_size
    assert tiny_pack.pack_photos(tiles / "train", tmp_path / "photos/train", 1.5 * one) <= 1.5 * one
    assert [path.stem for path in (tmp_path / "photos/train").iterdir()] == ["000_256_0_0"]
    with pytest.raises(SystemExit, match="no room"):
        call(tiny_pack, photos=tiles, output=tmp_path, limit=0, no_wheels=True)


def test_a_wheel_that_is_written_again_lacks_the_unused_files_and_their_records(tmp_path):
    wheel = tmp_path / "a-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for name, content in (
            ("a/b.py", "1"),
            ("a/big.pth", "0" * 99),
            ("a-1.dist-info/RECORD", "a/b.py,,\na/big.pth,,\n"),
        ):
            file.writestr(name, content)
    tiny_pack.leave_out(wheel, ("a/big", "c/"))
    with zipfile.ZipFile(wheel) as file:
        assert file.namelist() == ["a/b.py", "a-1.dist-info/RECORD"]
        assert file.read("a-1.dist-info/RECORD") == b"a/b.py,,\n" and file.read("a/b.py") == b"1"


def test_every_packed_package_has_a_locked_version():
    locked = (tiny_pack.ROOT / "requirements.lock").read_text().splitlines()
    for name in (*tiny_pack.WHEELS, *tiny_pack.FROM_SOURCE):
        assert any(line.startswith(f"{name}==") for line in locked), name
