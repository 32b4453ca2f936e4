"""A run resumes over what it began with: photos, captions, `model.checkpoint`, all parts of the backbone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.restoration.restorer import Restorer
from dit4sr_pl.train import train
from testing.toy_runs import SAMPLER, TOY_SD3, noisy, toy

pytestmark = pytest.mark.slow

PHOTOS = Path("photos")
OPTIONS = [
    "model.backbone.name=./sd3",
    "callbacks=default",
    "callbacks.checkpoint.every_n_train_steps=1",
    "trainer.limit_val_batches=0",
]


def start(*overrides: str, folder: str = "run", steps: int = 2) -> None:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        train(compose("train", [*toy(PHOTOS, Path(folder)), *OPTIONS, f"trainer.max_steps={steps}", *overrides]))


@pytest.fixture(scope="module")
def begun(photos, tmp_path_factory) -> Path:
    """Returns a folder with a run of two steps and all that it reads; paths are relative to it."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(photos, folder / "photos")
    for photo in (folder / "photos").glob("*.png"):
        photo.with_suffix(".txt").write_text(f"photo {photo.stem}")
    shutil.copytree(TOY_SD3, folder / "sd3")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        start(folder="first", steps=1)
        start("model.checkpoint=first/lr_stream.safetensors")
    return folder


@pytest.fixture
def copy(begun, tmp_path, monkeypatch) -> Path:
    """A copy of it, which is the working folder."""
    monkeypatch.chdir(shutil.copytree(begun, tmp_path / "copy", symlinks=True))
    return Path()


def resume(*overrides: str, folder: str = "run") -> None:
    start("model.checkpoint=first/lr_stream.safetensors", *overrides, folder=folder, steps=3)


def steps(folder: str = "run") -> list[str]:
    return sorted(path.stem for path in Path(folder, "checkpoints").glob("0*.ckpt"))


def test_all_that_changed_is_named_in_one_line_before_anything_is_written(copy):
    start(folder="first", steps=2)
    shutil.copy("photos/0.png", "photos/00.png")
    Path("photos/1.txt").write_text("another")
    noisy(Path("sd3/text_encoder/model.safetensors"))
    config = Path("sd3/scheduler/scheduler_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift": 1.5}))
    with pytest.raises(ValueError, match="run: the run began with other data: ") as refused:
        resume()
    message = str(refused.value)
    count = len(list(PHOTOS.glob("*.png")))
    for part in (
        "captions of photos",
        "model.checkpoint",
        "the backbone's scheduler; the backbone's text_encoder",
    ):
        assert part in message
    assert f"photos of photos: {count} (" in message and f"were {count - 1} (" in message and "\n" not in message
    assert "tokenizer" not in message and steps() == ["0000001", "0000002"]


def test_nothing_changed_and_what_no_checkpoint_records_is_not_compared(copy):
    resume()
    assert steps() == ["0000001", "0000002", "0000003"]
    path = Path("run/checkpoints/0000003.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert {"photos of photos", "captions of photos", "model.checkpoint"} == checkpoint["sources"].keys()
    for key in ("sources", "optimizer"):
        del checkpoint[key]
    del checkpoint["base"]["parts"]
    torch.save(checkpoint, path)
    shutil.copy("photos/0.png", "photos/00.png")
    start("model.checkpoint=first/lr_stream.safetensors", steps=4)
    assert steps()[-1] == "0000004"


def test_in_another_folder_it_continues_with_other_photos_and_says_so_but_not_with_other_latents(copy, caplog):
    shutil.copy("photos/0.png", "photos/00.png")
    checkpoint = "ckpt_path=run/checkpoints/0000002.ckpt"
    resume(checkpoint, folder="fork")
    assert "0000002.ckpt: trained with other data, as it continues: photos of photos: " in caplog.text
    noisy(Path("sd3/vae/diffusion_pytorch_model.safetensors"))
    with pytest.raises(Exception, match=r"first/lr_stream.safetensors: trained over another autoencoder"):
        resume(checkpoint, folder="other")
    with pytest.raises(ValueError, match=r"0000002.ckpt: trained over another autoencoder than the vae of ./sd3"):
        start(checkpoint, folder="other", steps=3)
    assert not Path("other/checkpoints").exists()


def test_a_network_restores_over_the_autoencoder_that_it_was_trained_over(copy, caplog):
    def load() -> Restorer:
        backbone = Backbone("./sd3", "float32", 8)
        return Restorer.load(backbone, SAMPLER, "run/lr_stream.safetensors", torch.device("cpu"))

    load()
    noisy(Path("sd3/text_encoder_3/model.safetensors"))
    load()
    assert "lr_stream.safetensors: trained over other parts than ./sd3 has now: text_encoder_3" in caplog.text
    noisy(Path("sd3/vae/diffusion_pytorch_model.safetensors"))
    with pytest.raises(ValueError, match="lr_stream.safetensors: trained over another autoencoder"):
        load()
