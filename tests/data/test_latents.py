"""Training on latents: those that `prepare stage=latents` writes, and the folders of the authors' scripts."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dit4sr_pl import prepare
from dit4sr_pl.backbone.autoencoder import LatentCoder
from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.cli.checks import read_shard
from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.randomness import derive_seed, generator
from dit4sr_pl.data.datasets import Draw
from dit4sr_pl.data.latents import CropSizes, LatentPairs, check_autoencoder
from dit4sr_pl.data.module import SuperResolutionData
from dit4sr_pl.degradation import Degradation
from dit4sr_pl.images.files import read_image, write_image
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.train import train
from testing.toy_runs import TOY_SD3, losses, toy

NAMES = ["set/a_0", "set/a_1", "set/b_0"]


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("crops")
    for number, name in enumerate(NAMES):
        write_image(folder / f"{name}.png", torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(number)))
    (folder / "set/a_1.txt").write_text("a cat")
    return folder


@pytest.fixture(scope="module")
def write(crops):
    """Returns a function that runs the stage and returns its error message; the config is made once."""
    words = ["stage=latents", "data.crop_size=64", "degradation=light", f"model.backbone.name={TOY_SD3}"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        given = compose("prepare", words)

    def write(folder: Path, photos: Path = crops, shard: str = "1/1") -> str | None:
        cfg = OmegaConf.merge(given, {"latents": str(folder), "data": {"folders": [str(photos)]}, "shard": shard})
        try:
            prepare.check(cfg)
            prepare.latents(cfg, read_shard(shard))
        except ValueError as error:
            return str(error)

    return write


@pytest.fixture(scope="module")
def latents(write, tmp_path_factory) -> Path:
    """The latents of the crops, written by two tasks."""
    folder = tmp_path_factory.mktemp("latents")
    assert write(folder, shard="2/2") is None and write(folder, shard="1/2") is None
    return folder


@pytest.fixture(scope="module")
def light() -> Degradation:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        options = compose("train", ["output=x"]).degradation
    return Degradation(**{key: value for key, value in options.items() if key != "_target_"})


@pytest.fixture(scope="module")
def released(latents, tmp_path_factory) -> Path:
    """A folder as the authors' scripts write it: flat, with embeddings of every prompt and of the empty one."""
    folder = tmp_path_factory.mktemp("released")
    for kind in ("latent_hr", "latent_lr", "prompt_embeds", "pooled_prompt_embeds"):
        (folder / kind).mkdir()
    for number, name in enumerate(NAMES):
        for kind in ("latent_hr", "latent_lr"):
            torch.save(
                torch.load(latents / kind / f"{name}.pt", weights_only=True), folder / f"{kind}/000000{number}.pt"
            )
        torch.save(torch.full((1, 85, 16), float(number)), folder / f"prompt_embeds/000000{number}.pt")
        torch.save(torch.full((1, 16), float(number)), folder / f"pooled_prompt_embeds/000000{number}.pt")
    torch.save(torch.full((1, 85, 16), -1.0), folder / "prompt_embeds/NULL_prompt_embeds.pt")
    torch.save(torch.full((1, 16), -1.0), folder / "pooled_prompt_embeds/NULL_pooled_prompt_embeds.pt")
    return folder


def test_latents_are_those_of_a_training_step_and_of_the_authors_layout(crops, latents, light):
    coder = LatentCoder(Backbone(str(TOY_SD3), "float32", 8).vae)
    for name in NAMES:
        image = read_image(crops / f"{name}.png")[None] / 255
        lr, hr = light(image, light.draw([derive_seed(0, "degradation", name)], (64, 64)))
        expected = {
            "latent_hr": coder.encode(hr, [generator("cpu", "posterior", 0, name)]),
            "latent_lr": coder.encode(enlarge(lr, (64, 64))),
        }
        for kind, latent in expected.items():
            stored = torch.load(latents / kind / f"{name}.pt", weights_only=True)
            assert stored.shape[0] == 1 and stored.dtype == torch.float32 and torch.equal(stored, latent)


def test_a_second_call_encodes_what_is_missing_and_other_sizes_are_named(write, latents, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in latents.rglob("*.pt")}
    again, others = sorted(before)[0], sorted(before)[1:]
    content = again.read_bytes()
    again.unlink()
    assert write(latents) is None
    assert again.read_bytes() == content and all(path.stat().st_mtime_ns == before[path] for path in others)
    write_image(tmp_path / "wide.png", torch.rand(3, 64, 96))
    assert "wide.png: 96x64 pixels; crops must be 64x64" in write(tmp_path / "latents", tmp_path)


def test_latents_of_another_seed_or_autoencoder_are_not_mixed_with_these(write, latents, crops, tmp_path):
    other = shutil.copytree(latents, tmp_path / "latents")
    record = json.loads((other / "latents.json").read_text())
    assert record["crop_size"] == 64 and record["degradation._target_"] == "Degradation" and record["vae"]
    (other / "latents.json").write_text(json.dumps(record | {"seed": 9}))
    assert f"latents={other}: encoded with seed=9 (now 0); give another folder" in write(other)
    (other / "latents.json").write_text(json.dumps(record | {"vae": "another"}))
    with pytest.raises(ValueError, match="latents of another autoencoder than the vae of sd3"):
        check_autoencoder([latents, other], record["vae"], "sd3")
    check_autoencoder([latents, tmp_path], record["vae"], "sd3")  # the authors' folders have no record
    (other / "latents.json").write_text("{")
    with pytest.raises(ValueError, match="latents.json: damaged"):
        check_autoencoder([other], record["vae"], "sd3")


def test_latents_that_are_cut_off_or_encoded_again_are_found_before_the_first_step(latents, tmp_path):
    other = shutil.copytree(latents, tmp_path / "latents")
    pairs = LatentPairs([other], None, 64, seed=0, empty_prompt_probability=0.2)
    before, path = pairs.check(), other / "latent_lr/set/a_1.pt"
    assert before == LatentPairs([latents], None, 64, seed=0, empty_prompt_probability=0.2).check()
    torch.save(torch.load(path, weights_only=True) + 1, path)
    assert pairs.check()["latents"] != before["latents"]  # its size is the same
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"a_1.pt: not read .*remove it and run prepare stage=latents"):
        pairs.check()


def test_samples_are_latents_and_captions_by_name(latents, crops):
    pairs = LatentPairs([latents], crops, 64, seed=0, empty_prompt_probability=0.2)
    assert [name for _, name in pairs.items] == NAMES and pairs.prompts() == {"", "a cat"}
    samples = [pairs[Draw(1, epoch, 7)] for epoch in range(200)]
    stored = torch.load(latents / "latent_hr/set/a_1.pt", weights_only=True)[0]
    assert all(torch.equal(sample["clean"], stored) and sample["position"] == 7 for sample in samples)
    assert 20 < sum(sample["prompt"] == "" for sample in samples) < 60
    assert pairs[Draw(1, 3, 0)]["prompt"] == pairs[Draw(1, 3, 99)]["prompt"]


def test_larger_latents_are_cut_at_the_same_place_of_both(latents):
    pairs = LatentPairs([latents], None, 32, seed=0, empty_prompt_probability=0)
    hr, lr = (torch.load(latents / kind / "set/b_0.pt", weights_only=True)[0] for kind in ("latent_hr", "latent_lr"))
    places = set()
    for epoch in range(12):
        sample = pairs[Draw(2, epoch, 0)]
        windows = hr.unfold(1, 4, 1).unfold(2, 4, 1)
        ((top, left),) = (windows == sample["clean"][:, None, None]).all(-1).all(-1).all(0).nonzero().tolist()
        assert torch.equal(sample["lr_latent"], lr[:, top : top + 4, left : left + 4])
        places.add((top, left))
    assert len(places) > 5
    with pytest.raises(ValueError, match="data.crop_size=128: .* is of 64 pixels; give data.crop_size=64"):
        LatentPairs([latents], None, 128, 0, 0)


def test_the_authors_folders_bring_their_embeddings(released):
    pairs = LatentPairs(str(released), None, 64, seed=0, empty_prompt_probability=0.5)
    samples = [pairs[Draw(2, epoch, 0)] for epoch in range(50)]
    assert {sample["embeds"].unique().item() for sample in samples} == {2.0, -1.0} and len(pairs) == 3
    assert all(sample["pooled"].shape == (16,) and sample["embeds"].shape == (85, 16) for sample in samples)
    assert all(sample["pooled"][0] == sample["embeds"][0, 0] for sample in samples) and not pairs.prompts()


def test_latents_that_do_not_fit_together_are_named(released, tmp_path):
    for kind in ("latent_hr", "latent_lr"):
        (tmp_path / kind).mkdir()
    torch.save(torch.zeros(1, 4, 8, 8), tmp_path / "latent_hr/a.pt")
    torch.save(torch.zeros(1, 4, 8, 8), tmp_path / "latent_lr/b.pt")
    with pytest.raises(ValueError, match="latent_hr and latent_lr differ in 2 names, such as a"):
        LatentPairs([tmp_path], None, 64, 0, 0)
    with pytest.raises(FileNotFoundError, match="latent_hr: no latents; run prepare stage=latents"):
        LatentPairs([tmp_path / "latent_lr"], None, 64, 0, 0)
    (tmp_path / "latent_lr/b.pt").rename(tmp_path / "latent_lr/a.pt")
    (tmp_path / "latent_lr/a.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="latent_lr/a.pt: not read"):
        LatentPairs([tmp_path], None, 64, 0, 0)[Draw(0, 0, 0)]
    torch.save(torch.zeros(1, 4, 8, 4), tmp_path / "latent_lr/a.pt")
    with pytest.raises(ValueError, match=r"shape \(4, 8, 4\), the first ones have \(4, 8, 8\)"):
        LatentPairs([tmp_path], None, 64, 0, 0)[Draw(0, 0, 0)]
    with pytest.raises(ValueError, match="has prompt embeddings"):
        LatentPairs([released], tmp_path, 64, 0, 0)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Path:
    """Latents of 5 images in two files, in half precision, every number in them another."""
    folder = tmp_path_factory.mktemp("pieces")
    for kind, first in (("latent_hr", 0), ("latent_lr", 1)):
        (folder / kind).mkdir()
        numbers = (first + 2 * torch.arange(5 * 2 * 16 * 16)).view(5, 2, 16, 16) % 2048
        torch.save(numbers[:3].half(), folder / kind / "0.pt")
        torch.save(numbers[3:].half(), folder / kind / "1.pt")
    return folder


def test_latents_in_memory_may_share_files_and_are_as_those_read_one_by_one(pieces, released, tmp_path):
    together = LatentPairs([pieces], None, 128, seed=0, empty_prompt_probability=0, in_memory=True)
    assert [name for _, name in together.items] == ["0"] * 3 + ["1"] * 2 and together.shape == (2, 16, 16)
    hr = [torch.load(pieces / f"latent_hr/{name}.pt", weights_only=True) for name in "01"]
    for index, expected in enumerate(torch.cat(hr)):
        assert torch.equal(together[Draw(index, 0, 0)]["clean"], expected.float())
    with pytest.raises(ValueError, match="something other than the tensor of one image"):
        LatentPairs([pieces], None, 128, 0, 0)
    memory, files = (LatentPairs([released], None, 64, 0, 0.5, in_memory=kept) for kept in (True, False))
    for epoch in range(4):
        kept, read = (pairs[Draw(1, epoch, 9)] for pairs in (memory, files))
        assert kept.keys() == read.keys() and kept["name"] == read["name"]
        assert all(torch.equal(kept[key], read[key]) for key in ("clean", "lr_latent", "embeds", "pooled"))
    shutil.copytree(pieces, tmp_path / "pieces")
    torch.save(torch.zeros(3, 2, 16, 16), tmp_path / "pieces/latent_lr/1.pt")
    with pytest.raises(ValueError, match=r"latent_lr/1.pt: latents of shape \(3, 2, 16, 16\); they must have \(2, 2,"):
        LatentPairs([tmp_path / "pieces"], None, 128, 0, 0, in_memory=True)


def test_a_draw_may_ask_for_another_crop_size(latents):
    pairs, smaller = (LatentPairs([latents], None, size, seed=0, empty_prompt_probability=0) for size in (64, 32))
    for epoch in range(4):
        assert torch.equal(pairs[Draw(1, epoch, 0, crop=4)]["clean"], smaller[Draw(1, epoch, 0)]["clean"])


def batches_of(data: SuperResolutionData, count: int) -> list[dict]:
    return list(itertools.islice(data.train_dataloader(), count))


def test_batches_have_one_crop_size_and_as_many_latents_each_as_a_function_of_the_position(pieces, light):
    def data(seen: int) -> SuperResolutionData:
        options = {"latents": [pieces], "latents_in_memory": True, "latent_crops": [(64, 0.5), (128, 0.5)]}
        made = SuperResolutionData([], [], light, 64, batch_size=8, num_workers=0, seed=1, **options)
        made._images_seen = lambda: seen
        return made

    batches = batches_of(data(0), 40)
    sizes = [tuple(batch["clean"].shape) for batch in batches]
    assert set(sizes) == {(8, 2, 8, 8), (2, 2, 16, 16)} and 10 < sizes.count((2, 2, 16, 16)) < 30
    assert [int(batch["position"][0]) for batch in batches] == list(range(0, 320, 8))
    for ours, theirs in zip(batches_of(data(80), 5), batches[10:15], strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ("clean", "lr_latent", "position"))


@pytest.mark.parametrize(
    "crops, message",
    [
        ([(72, 1.0)], "72 is no multiple of 16 pixels up to 128"),
        ([(256, 1.0)], "256 is no multiple of 16 pixels up to 128"),
        ([(64, 0.0)], "give sides and shares"),
        ([], "give sides and shares"),
    ],
)
def test_crops_that_cannot_be_cut_are_refused(crops, message):
    with pytest.raises(ValueError, match=message):
        CropSizes([], crops, (2, 16, 16), seed=0)


def start(photos: Path, folder: Path, *words: str) -> None:
    options = ["data=latents", "data.folders=[]", "data.validation_limit=1", "metrics=[psnr]", "callbacks=default"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        train(compose("train", [*toy(photos, folder)[1:], *options, *words]))


@pytest.mark.slow
def test_a_run_on_latents_resumes_exactly_and_needs_no_degradation(photos, latents, crops, tmp_path, monkeypatch):
    words = [
        f"data.latents=[{latents}]",
        f"data.captions={crops}",
        "trainer.max_steps=3",
        "trainer.limit_val_batches=0",
    ]
    monkeypatch.setattr(LatentCoder, "encode", None)
    monkeypatch.setattr(Degradation, "__call__", None)
    start(photos, tmp_path / "whole", *words)
    part = ["callbacks.checkpoint.every_n_train_steps=1"]
    start(photos, tmp_path / "parts", *words, *part, "trainer.max_steps=2")
    start(photos, tmp_path / "parts", *words, *part)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_on_the_authors_folders_reads_no_text_encoder(photos, released, tmp_path, monkeypatch):
    monkeypatch.setattr(Backbone, "text_encoders", None)
    start(photos, tmp_path, f"data.latents={released}", "trainer.limit_val_batches=0", "trainer.max_steps=1")
    assert len(losses(tmp_path)) == 1
