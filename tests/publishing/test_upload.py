"""LR streams on the hub: what is uploaded to a hub on this machine, and what a command reads back."""

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants

from dit4sr_pl.common.hashing import weights_hash
from dit4sr_pl.images.files import write_image
from dit4sr_pl.model import DiT4SRTransformer, SD3ControlNet, Variant, load_part, save_part
from dit4sr_pl.model.checkpoint_files import checkpoint_file
from dit4sr_pl.model.trained_part import base_of, part_of
from dit4sr_pl.scores.results import Result, write_result
from testing.commands import call
from testing.local_hub import TOKEN, LocalHub, serving
from testing.networks import randomise
from testing.toy_runs import TOY_SD3

SD35 = "stabilityai/stable-diffusion-3.5-medium"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving(LocalHub(), monkeypatch, tmp_path) as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture(scope="module")
def run(toy_backbone, tmp_path_factory) -> Path:
    """A finished run over what its file calls Stable Diffusion 3.5-medium, with its validation and an evaluation."""
    folder = tmp_path_factory.mktemp("outputs") / "mine"
    net = DiT4SRTransformer(toy_backbone.transformer, Variant(lr_injection="linear"))
    randomise(net.lr_stream)
    part = part_of(net, base_of(net, SD35))
    save_part(part, folder / "lr_stream.safetensors")
    shutil.copy(TOY_SD3.parent / "run" / "config.yaml", folder)
    (folder / "finished.yaml").write_text("steps: 2\n")
    for place, dataset, metric in ((folder, "validation", "psnr"), (folder.with_name("scored"), "realsr", "liqe")):
        scores = {f"{dataset}{image}": {metric: 25.0 + image, "ssim": 0.5} for image in range(3)}
        hashes = "0" * 32, weights_hash(part.state)
        result = Result(
            "mine", "DiT4SR", "linear_lr_injection", dataset, 0, "images", *hashes, versions={}, scores=scores
        )
        write_result(result, place)
        for name in scores:
            write_image(place / "images" / f"{name}.png", torch.rand(3, 8, 8))
    return folder


def convert(folder: Path, *arguments) -> str | None:
    return call("dit4sr_pl.convert", *arguments, cwd=folder)


@pytest.mark.slow
def test_what_is_uploaded_is_read_back_by_its_name(hub, run, tmp_path, capsys):
    assert convert(tmp_path, f"input={run}", "output=hub:me/mine", "private=true") is None
    assert "python -m dit4sr_pl.restore input=FILE checkpoint=hub:me/mine" in capsys.readouterr().out
    repo = hub.repos["me/mine"]
    files = repo.commits[repo.refs["main"]]
    assert repo.private and len(repo.commits) == 2  # the empty repository, and one commit
    pictures = [f"images/validation{image}.png" for image in range(3)]
    assert set(files) == {".gitattributes", "README.md", "lr_stream.safetensors", *pictures}
    assert files[pictures[0]] == (run / pictures[0]).read_bytes()
    back, ours = load_part(checkpoint_file("hub:me/mine")), load_part(run / "lr_stream.safetensors")
    assert (back.network_config, back.base) == (ours.network_config, ours.base)
    assert all(torch.equal(back.state[name], ours.state[name]) for name in back.state | ours.state)


def test_the_card_is_made_from_configuration_scores_and_pictures(hub, run, tmp_path):
    options = [f"card.results=[{run.with_name('scored')}]", "card.pictures=5"]
    assert convert(tmp_path, f"input={run}", "output=hub:me/mine/first", *options) is None
    repo = hub.repos["me/mine"]
    card = ModelCard(repo.commits[repo.refs["main"]]["first/README.md"].decode())
    data = card.data
    assert (data.base_model, data.base_model_relation) == (SD35, "adapter")
    assert (data.license, data.license_name) == ("other", "stabilityai-ai-community") and SD35 in data.license_link
    assert (data.library_name, data.pipeline_tag) == ("dit4sr_pl", "image-to-image")
    assert {"dit4sr", "super-resolution", "variant:linear_lr_injection"} <= set(data.tags)
    found = {(each.dataset_name, each.metric_type): each.metric_value for each in data.eval_results}
    assert found == {
        ("validation", "psnr"): 26.0,
        ("validation", "ssim"): 0.5,
        ("realsr", "liqe"): 26.0,
        ("realsr", "ssim"): 0.5,
    }
    weights = sum(weight.numel() for weight in load_part(run / "lr_stream.safetensors").state.values())
    rows = [line.split() for line in card.text.splitlines()]
    assert ["|", "realsr", "|", "3", "|", "-", "|", "0.5000", "|", "26.0000", "|"] in rows
    assert ["|", "lr_injection", "|", "linear", "|"] in rows and ["|", "optimizer", "steps", "|", "2", "|"] in rows
    assert ["|", "learning", "rate", "|", "5e-05", "|"] in rows
    for text in (f"{weights:,} weights", "checkpoint=hub:me/mine/first", "![realsr1](images/realsr1.png)"):
        assert text in card.text
    assert str(run) not in card.text and "photos" not in card.text.replace("low-resolution photos", "")


def test_an_lr_stream_file_over_the_small_model_goes_up_under_the_licence_of_the_package(hub, tmp_path):
    assert convert(tmp_path, f"input={checkpoint_file('tiny-dit4sr')}", "output=hub:me/tiny") is None
    repo = hub.repos["me/tiny"]
    card = ModelCard(repo.commits[repo.refs["main"]]["README.md"].decode())
    assert card.data.license == "apache-2.0" and card.data.base_model is None and card.data.eval_results is None
    assert "`tiny-sd3`" in card.text and not repo.private
    own = ["card.license=other", "card.license_name=mine", "card.license_link=https://a.b/c"]
    assert convert(tmp_path, f"input={checkpoint_file('tiny-dit4sr')}", "output=hub:me/tiny", *own) is None
    card = ModelCard(repo.commits[repo.refs["main"]]["README.md"].decode())
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "mine", "https://a.b/c")


@pytest.mark.slow
def test_mistakes_of_an_upload_get_one_line(hub, run, toy_backbone, tmp_path, monkeypatch):
    baseline = SD3ControlNet(toy_backbone.transformer, num_layers=1)
    save_part(part_of(baseline, base_of(baseline, "toy")), tmp_path / "controlnet.safetensors")
    other = tmp_path / "other"
    shutil.copytree(run, other)
    save_part(load_part(checkpoint_file("tiny-dit4sr")), other / "lr_stream.safetensors")
    given = f"input={run}"
    for arguments, message in (
        ([given, "output=hub:me"], "hub:me: not an address; give hub:OWNER/NAME"),
        ([f"input={tmp_path}", "output=hub:me/x"], "lr_stream.safetensors: no such file"),
        (["input=controlnet.safetensors", "output=hub:me/x"], "a sd3_controlnet; only LR streams go to the hub"),
        ([f"input={other}", "output=hub:me/x"], "scores of other weights than"),
        ([given, "output=hub:me/x", "card.results=[nowhere]"], "card.results=nowhere: no such file or folder"),
        ([given, "output=hub:me/x", "private=perhaps"], "private=perhaps: must be true, false or null"),
        ([given, "output=hub:me/x@gone"], "has no revision gone; give a branch, tag or commit"),
        ([given, "output=hub:you/x"], "you/x needs a token that may write there; run `hf auth login` or set HF_TOKEN"),
    ):
        line = convert(tmp_path, *arguments)
        assert line.startswith("error: ") and message in line and "\n" not in line, line
    monkeypatch.delenv("HF_TOKEN")
    assert "me/y needs a token that may write there" in convert(tmp_path, given, "output=hub:me/y")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in convert(tmp_path, given, "output=hub:me/y")
    assert "me/y" not in hub.repos
