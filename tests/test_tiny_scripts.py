"""The scripts that make the small pair, at toy size: photos, base, latent pairs, LR stream, pack."""

import shutil
import sys

import numpy as np
import pytest
import tiny_base
import tiny_pack
import tiny_pairs
import tiny_photos
import tiny_rebase
import tiny_release
import torch
from diffusers import SD3Transformer2DModel
from hydra import compose, initialize_config_dir
from PIL import Image
from safetensors.torch import load_file

from dit4sr_pl.backbone import SHIPPED, Backbone
from dit4sr_pl.config import conf_folder
from dit4sr_pl.images import find_images, image_size, read_image
from dit4sr_pl.latent_pairs import LatentPairs
from dit4sr_pl.model import load_part
from dit4sr_pl.train import train

PIPELINE = SHIPPED / "tiny-sd3"
SMALL = dict(num_layers=2, num_attention_heads=2, caption_projection_dim=64, dual_attention_layers=(0,))
SMALL = tiny_base.CONFIG | SMALL


@pytest.fixture
def script(monkeypatch):
    def script(module, **options) -> None:
        words = []
        for name, value in options.items():
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [flag, *map(str, value if isinstance(value, list) else [value])]
        monkeypatch.setattr(sys, "argv", ["script", *words])
        module.main()

    return script


@pytest.fixture(scope="session")
def tiles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiles")
    rng = np.random.default_rng(0)
    for photo_set, count in (("train", 3), ("held_out", 2)):
        (folder / photo_set).mkdir()
        for number in range(count):
            small = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
            small.resize((256, 256), Image.Resampling.BICUBIC).save(folder / photo_set / f"{number:03d}_256_0_0.png")
    return folder


@pytest.fixture(scope="session")
def pairs(tiles, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    with pytest.MonkeyPatch.context() as patch:
        words = [
            "--photos",
            tiles / "train",
            "--pipeline",
            PIPELINE,
            "--output",
            folder,
            "--workers",
            0,
            "--device",
            "cpu",
        ]
        patch.setattr(sys, "argv", ["script", *map(str, words)])
        tiny_pairs.main()
    return folder


def test_a_photo_is_cut_where_it_is_sharp_and_flat_tiles_are_rare(tmp_path, script):
    rng = np.random.default_rng(0)
    detail = rng.integers(0, 256, (1000, 2000), dtype=np.uint8)
    detail[:, 700:] = 128
    photo = Image.fromarray(detail).convert("RGB")
    (tmp_path / "packages/sharp").mkdir(parents=True)
    (tmp_path / "packages/soft_release").mkdir()
    photo.save(tmp_path / "packages/sharp/a.png")
    photo.resize((500, 250)).resize((2000, 1000)).save(tmp_path / "packages/soft_release/b.png")
    (tmp_path / "list.txt").write_text("train sharp a.png\nheld_out soft/release b.png\n")
    script(tiny_photos, output=tmp_path / "tiles", packages=tmp_path / "packages", list=tmp_path / "list.txt")

    sharp, soft = (
        sorted(path.name for path in (tmp_path / "tiles" / name).iterdir()) for name in ("train", "held_out")
    )
    assert sharp[0].startswith("000_") and max(int(name.split("_")[1]) for name in sharp) == 1365
    assert max(int(name.split("_")[1]) for name in soft) <= 910
    assert len(sharp) < sum(len(tiny_photos.cuts(side // 2)) * len(tiny_photos.cuts(side)) for side in (1365, 910, 455))
    assert {image_size(path) for path in (tmp_path / "tiles").rglob("*.png")} == {(256, 256)}


def test_the_base_resumes_and_its_decay_ends_in_a_pipeline(tiles, tmp_path, script, monkeypatch, capsys):
    monkeypatch.setattr(tiny_base, "CONFIG", SMALL)
    options = dict(photos=tiles, pipeline=PIPELINE, state=tmp_path, tokens=256, device="cpu", no_compile=True)
    script(tiny_base, minutes=0.01, **options)
    first = torch.load(tmp_path / "constant.pt", weights_only=True)
    script(tiny_base, minutes=0.01, **options)
    second = torch.load(tmp_path / "constant.pt", weights_only=True)
    assert 0 < first["step"] < second["step"] and second["progress"] == 0

    script(tiny_base, minutes=0.01, phase="decay", **options)
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["constant.pt", "held_out.pt", "train.pt"]
    assert "decay step" in (said := capsys.readouterr().out) and "0.9: " in said
    transformer = Backbone(str(tmp_path / "tiny-sd3"), "float32", 8).transformer
    assert str(PIPELINE) not in (tmp_path / "tiny-sd3/transformer/config.json").read_text()
    assert transformer.config.num_layers == 2 and all(weight.isfinite().all() for weight in transformer.parameters())


def test_a_decay_takes_the_learning_rate_to_zero_and_resumes_on_its_way(tiles, tmp_path, script, monkeypatch):
    monkeypatch.setattr(tiny_base, "CONFIG", SMALL)
    rates, clock = [], iter(range(10_000))
    monkeypatch.setattr(tiny_base.time, "perf_counter", lambda: next(clock))

    def train_step(training):
        rates.append(training.optimizer.param_groups[0]["lr"])
        training.step += 1
        return torch.zeros(())

    monkeypatch.setattr(tiny_base.Training, "train_step", train_step)
    monkeypatch.setattr(tiny_base, "WARM_UP", 1)
    monkeypatch.setattr(tiny_base, "SAVE_EVERY", 5)
    monkeypatch.setattr(tiny_base.Training, "score", lambda _: "")
    options = dict(photos=tiles, pipeline=PIPELINE, state=tmp_path, device="cpu", no_compile=True, phase="decay")
    monkeypatch.setattr(tiny_base, "write_pipeline", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        script(tiny_base, minutes=0.5, **options)
    assert rates == sorted(rates, reverse=True) and rates[0] > 0.9e-3 and rates[-1] < 0.1e-3
    done = torch.load(tmp_path / "decay.pt", weights_only=True)["progress"]
    rates.clear()
    with pytest.raises(KeyboardInterrupt):
        script(tiny_base, minutes=0.5, **options)
    assert max(rates) <= 1e-3 * (1 - done)


def test_pairs_are_the_latents_of_tiles_and_of_their_mirror_images(tiles, pairs, tiny_backbone):
    (file,) = pairs.glob("*.safetensors")
    latents = load_file(file)
    assert latents["clean"].shape == latents["lr_latent"].shape == (6, 16, 32, 32)
    hr = torch.stack([read_image(path) for path in sorted((tiles / "train").iterdir())]) / 255
    for half, images in ((slice(0, 3), hr), (slice(3, 6), hr.flip(-1))):
        clean = tiny_backbone.coder.encode(images)
        assert (latents["clean"][half].float() - clean).abs().mean() < 0.05
        assert (latents["lr_latent"][half].float() - clean).abs().mean() > 0.05


def test_batches_of_pairs_are_a_function_of_their_position_and_have_as_many_tokens(pairs):
    data = LatentPairs(pairs, {128: 1, 256: 1}, batch_size=8, seed=0, start=lambda: 16)
    batches = [batch for _, batch in zip(range(12), data, strict=False)]
    assert {tuple(batch["clean"].shape) for batch in batches} == {(8, 16, 16, 16), (2, 16, 32, 32)}
    assert [int(batch["position"][0]) for batch in batches] == list(range(16, 112, 8))
    again = LatentPairs(pairs, {128: 1, 256: 1}, batch_size=8, seed=0).batch(24)
    assert torch.equal(again["clean"], batches[1]["clean"]) and torch.equal(again["lr_latent"], batches[1]["lr_latent"])


def test_the_lr_stream_trains_on_pairs_until_its_time_is_over_and_resumes(tiles, pairs, tmp_path):
    def run(*words: str) -> None:
        overrides = ["experiment=tiny_dit4sr", f"data.pairs={pairs}", f"data.folders=[{tiles / 'train'}]", *words]
        overrides += [f"output={tmp_path / 'run'}", "data.batch_size=4", "model.compile=false", "~callbacks.progress"]
        overrides += ["trainer.precision=32-true", "trainer.log_every_n_steps=1", "+trainer.enable_progress_bar=false"]
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            train(compose("train", overrides))

    run("trainer.max_time=00:00:00:03")
    last = (tmp_path / "run/checkpoints/last.ckpt").resolve()
    assert int(last.stem) > 0 and (tmp_path / "run/lr_stream.safetensors").exists()
    run("trainer.max_time=00:00:10:00", f"trainer.max_steps={int(last.stem) + 1}")
    assert (tmp_path / "run/checkpoints/last.ckpt").resolve().stem == f"{int(last.stem) + 1:07d}"


def test_an_lr_stream_goes_over_to_another_base_and_back_into_a_package(tmp_path, script):
    base, start = tmp_path / "base", tmp_path / "start.safetensors"
    shutil.copytree(PIPELINE, base)
    net = SD3Transformer2DModel.from_pretrained(base / "transformer")
    with torch.no_grad():
        net.proj_out.weight.mul_(1.5)
    net.save_pretrained(base / "transformer")
    shipped = SHIPPED / "tiny-dit4sr/lr_stream.safetensors"
    script(tiny_rebase, trained=shipped, base=base, output=start)
    with pytest.raises(ValueError, match="trained over"):
        script(tiny_release, trained=start, output=tmp_path / "package/tiny-dit4sr")

    script(tiny_release, trained=start, base=base, output=tmp_path / "package/tiny-dit4sr")
    released, before = load_part(tmp_path / "package/tiny-dit4sr/lr_stream.safetensors"), load_part(shipped)
    assert released.settings == before.settings and released.base["name"] == "tiny-sd3"
    assert released.base["fingerprint"] != before.base["fingerprint"]
    assert all(torch.equal(released.state[name], before.state[name]) for name in before.state)
    assert (tmp_path / "package/tiny-sd3/transformer/config.json").exists()


def test_a_pack_holds_a_tile_of_every_photo_within_its_limit(tiles, tmp_path, script, monkeypatch, capsys):
    monkeypatch.setattr(tiny_pack, "tracked_files", lambda without: [])
    script(tiny_pack, photos=tiles, output=tmp_path, limit=0.5, no_wheels=True)
    assert "of 0.5" in capsys.readouterr().out
    assert len(find_images(tmp_path / "photos/train")) == 3
    a, b = (read_image(next(folder.glob("train/000_256_0_0.*"))).float() for folder in (tiles, tmp_path / "photos"))
    assert (a - b).abs().mean() < 3
    with pytest.raises(SystemExit, match="no room"):
        script(tiny_pack, photos=tiles, output=tmp_path, limit=0, no_wheels=True)
