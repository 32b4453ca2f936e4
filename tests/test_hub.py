"""One word for a release or an LR stream on the hub, in every command, against a hub on this machine."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from hydra.errors import InstantiationException

from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.images.files import read_image, write_image
from dit4sr_pl.pipeline import DiT4SRPipeline
from dit4sr_pl.restoration.restorer import Restorer
from testing.commands import call
from testing.local_hub import TOKEN, LocalHub, serving
from testing.releases import write_toy_release
from testing.toy_runs import TOY_SD3

SD35 = "stabilityai/stable-diffusion-3.5-medium"
SMALL = ("device=cpu", "sampler.steps=2", "sampler.smallest=1")


@pytest.fixture(scope="module")
def releases(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("releases")
    for name in ("dit4sr_q", "dit4sr_r1"):
        write_toy_release(folder / name, legacy=name == "dit4sr_q")
    return folder


@pytest.fixture
def hub(releases, monkeypatch, tmp_path):
    """A hub with two releases and, by the name of Stable Diffusion 3.5-medium, a toy."""
    hub = LocalHub()
    hub.add("acceptee/DiT4SR", releases)
    hub.add(SD35, TOY_SD3)
    with serving(hub, monkeypatch, tmp_path):
        yield hub


@pytest.fixture
def photo(tmp_path) -> Path:
    write_image(tmp_path / "lr" / "photo.png", torch.rand(3, 8, 10, generator=torch.Generator().manual_seed(0)))
    return tmp_path / "lr" / "photo.png"


@pytest.fixture
def loaded(monkeypatch) -> list:
    """The backbones and samplers that commands load a network for; they end there, in one line."""
    calls = []

    def load(backbone, sampler, checkpoint, device, offload=None, *_):
        calls.append((backbone, sampler, checkpoint, offload))
        raise ValueError("loaded")

    monkeypatch.setattr(Restorer, "load", load)
    return calls


@pytest.mark.slow
def test_one_command_restores_with_a_release_and_a_second_one_downloads_nothing(
    hub, releases, photo, tmp_path, monkeypatch, capsys
):
    command = [f"input={photo}", "checkpoint=dit4sr_q", *SMALL]
    assert call("dit4sr_pl.restore", *command, f"output={tmp_path / 'first'}", cwd=tmp_path) is None
    assert f"warning: no GPU: {SD35} runs on the CPU" in capsys.readouterr().err
    files = [*(releases / "dit4sr_q").rglob("*"), *TOY_SD3.rglob("*")]
    contents = {file.read_bytes() for file in files if file.is_file()}
    assert hub.sent == sum(map(len, contents))  # each once, although several tokenizers are the same
    sent = hub.sent
    assert call("dit4sr_pl.restore", *command, f"output={tmp_path / 'second'}", cwd=tmp_path) is None
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert call("dit4sr_pl.restore", *command, f"output={tmp_path / 'offline'}", cwd=tmp_path) is None
    local = [f"checkpoint={releases / 'dit4sr_q'}", "backbone=sd35_medium", f"model.backbone.name={TOY_SD3}"]
    assert call("dit4sr_pl.restore", *command, *local, f"output={tmp_path / 'third'}", cwd=tmp_path) is None
    assert hub.sent == sent
    first, *others = (read_image(tmp_path / n / "photo.png") for n in ("first", "second", "offline", "third"))
    assert all(torch.equal(first, other) for other in others)
    other = [f"input={photo}", f"output={tmp_path / 'other'}", "checkpoint=dit4sr_r1", *SMALL]
    assert call("dit4sr_pl.restore", *other, cwd=tmp_path) is None
    assert not torch.equal(first, read_image(tmp_path / "other" / "photo.png"))


@pytest.mark.slow
def test_a_checkpoint_brings_its_model_to_every_command_that_restores(
    hub, releases, photo, tmp_path, monkeypatch, loaded
):
    write_image(tmp_path / "hr" / "photo.png", torch.zeros(3, 32, 40))
    dataset = ["dataset=folder", f"dataset.folder={tmp_path}", "dataset.lr=lr", "dataset.hr=hr", "metrics=[psnr]"]
    restoring = [f"input={photo}", f"output={tmp_path / 'restored'}"]
    commands = [
        ("dit4sr_pl.restore", "checkpoint=dit4sr_q", *restoring),
        ("dit4sr_pl.restore", "checkpoint=hub:acceptee/DiT4SR/dit4sr_r1", *restoring),
        ("dit4sr_pl.restore", f"checkpoint={releases / 'dit4sr_r1'}", *restoring),
        ("dit4sr_pl.app", "checkpoint=dit4sr_q", "port=0"),
        ("dit4sr_pl.evaluate", "checkpoint=dit4sr_q", *dataset, f"output={tmp_path / 'evaluated'}"),
    ]
    for command in commands:
        assert call(*command, cwd=tmp_path) == "error: loaded"
        backbone, sampler, _, offload = loaded.pop()
        assert (backbone.name, backbone.dtype, backbone.gpu_memory) == (SD35, torch.bfloat16, 22)
        assert (sampler.steps, sampler.guidance_scale, sampler.t5_tokens) == (40, 8.0, 256)
        assert offload is None
    chosen = ["backbone=tiny_sd3", "sampler=tiny", "checkpoint=dit4sr_q", *restoring]
    assert call("dit4sr_pl.restore", *chosen, cwd=tmp_path) == "error: loaded"
    assert loaded.pop()[0].name == "tiny-sd3"
    kept = ["sampler.steps=3", "model.backbone.dtype=float16", "checkpoint=dit4sr_q", *restoring]
    assert call("dit4sr_pl.restore", *kept, cwd=tmp_path) == "error: loaded"
    backbone, sampler, *_ = loaded.pop()
    assert (backbone.dtype, sampler.steps, sampler.guidance_scale) == (torch.float16, 3, 8.0)
    assert call("dit4sr_pl.restore", *restoring, cwd=tmp_path) == "error: loaded"
    assert loaded.pop()[0].name == "tiny-sd3"  # of tiny-dit4sr, the default


def test_offloading_follows_the_gpus_memory(monkeypatch):
    backbone = Backbone("tiny-sd3", "float32", 8, gpu_memory=22)
    for memory, offload in ((16, True), (24, False)):
        properties = SimpleNamespace(total_memory=memory * 2**30)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda _, properties=properties: properties)
        assert backbone.exceeds(torch.device("cuda")) is offload
    assert not backbone.exceeds(torch.device("cpu"))
    assert not Backbone("tiny-sd3", "float32", 8).exceeds(torch.device("cuda"))


@pytest.mark.slow
def test_the_pipeline_takes_the_same_words(hub, releases, photo):
    options = {"num_inference_steps": 1, "smallest": 1, "output_type": "pt"}
    images = []
    for name in ("dit4sr_q", "hub:acceptee/DiT4SR/dit4sr_q@main", releases / "dit4sr_q"):
        pipe = DiT4SRPipeline.from_pretrained(name)
        pipe.set_progress_bar_config(disable=True)
        assert pipe.lr_stream.variant.legacy_lr_keys and pipe.config.sampler["guidance_scale"] == 8.0
        assert pipe.lr_stream.config.base["name"] == SD35 and pipe.transformer.dtype == torch.bfloat16
        images.append(pipe(read_image(photo)[None] / 255, **options).images)
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    hub.repos[SD35].gated = True
    with pytest.raises(FileNotFoundError, match=f"^{SD35}: a gated model; accept the licence at .*/{SD35}, and run "):
        DiT4SRPipeline.from_pretrained("dit4sr_q", force_download=True)


@pytest.mark.parametrize(
    "trouble, message",
    [
        ("gated", f"a gated model; accept the licence at <hub>/{SD35}, and run `hf auth login` or set HF_TOKEN"),
        ("missing", f"<hub>/{SD35} does not exist or is not open to you; check the name; if it is private or gated, "),
        ("broken", "<hub> answers with error 503; try again later"),
        ("offline", "not among the downloaded files, and HF_HUB_OFFLINE is set; unset it once"),
        ("elsewhere", "http://127.0.0.1:9 cannot be reached; try again later"),
    ],
)
def test_a_base_that_cannot_be_had_is_one_line_before_anything_is_downloaded(
    hub, photo, tmp_path, monkeypatch, trouble, message
):
    if trouble == "gated":
        hub.repos[SD35].gated = True
    elif trouble == "missing":
        del hub.repos[SD35]
    elif trouble == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif trouble == "elsewhere":
        template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    hub.broken = trouble == "broken"
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    line = call(
        "dit4sr_pl.restore", f"input={photo}", f"output={tmp_path}", "checkpoint=dit4sr_q", *SMALL, cwd=tmp_path
    )
    assert line.startswith(f"error: model.backbone.name={SD35}: {message.replace('<hub>', hub.endpoint)}"), line
    assert hub.sent == 0


def test_a_base_that_is_gated_after_the_first_look_is_one_line_too(hub):
    hub.accepted.add(TOKEN)
    hub.repos[SD35].gated = True
    for component in ("transformer", "vae", "scheduler", "text_encoders"):
        with pytest.raises(FileNotFoundError, match=f"^model.backbone.name={SD35}: a gated model; accept") as error:
            getattr(Backbone(SD35, "float32", 8), component)
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_training_starts_from_a_release_and_says_which_model_fits(hub, run, monkeypatch):
    fits = ["model=dit4sr_legacy", "model.network.gradient_checkpointing=false", "model.backbone.dtype=float32"]
    small = ["sampler.guidance_scale=1", "sampler.steps=1", "model.backbone.t5_tokens=8", "sampler.t5_tokens=8"]
    assert math.isfinite(run("tuned", *fits, *small, "model.checkpoint=dit4sr_q", "trainer.max_steps=1")["train/loss"])
    with pytest.raises(InstantiationException, match=f"dit4sr_q: trained over {SD35}, and this base model has other"):
        run("other", "model.checkpoint=dit4sr_q", "model.backbone.name=tiny-sd3")


def test_a_sweep_over_releases_takes_the_backbone_in_every_job(hub, photo, tmp_path, monkeypatch, loaded):
    names = "checkpoint=dit4sr_q,tiny-dit4sr"
    arguments = ["-m", names, f"input={photo}", f"output={tmp_path / 'out'}", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    assert "loaded" in call("dit4sr_pl.restore", *arguments, cwd=tmp_path)
    assert [backbone.name for backbone, *_ in loaded] == [SD35, "tiny-sd3"]
