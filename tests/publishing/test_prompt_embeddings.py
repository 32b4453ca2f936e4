"""Prompt embeddings that come with weights: who writes them, who reads them, and what is not taken for them."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit4sr_pl.backbone.fingerprints import TEXT_PARTS
from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.backbone.shipped_prompts import HeldPrompts, ShippedPrompts
from dit4sr_pl.common.files import ASSETS
from dit4sr_pl.common.hub import PROMPTS
from dit4sr_pl.images.files import read_image, write_image
from dit4sr_pl.model import DiT4SRTransformer, Variant, load_part, save_part
from dit4sr_pl.model.checkpoint_files import checkpoint_file
from dit4sr_pl.model.trained_part import base_of, part_of
from dit4sr_pl.pipeline import DiT4SRPipeline
from dit4sr_pl.restoration.restorer import Restorer
from testing.commands import call
from testing.local_hub import TOKEN, LocalHub, serving
from testing.networks import randomise
from testing.toy_runs import SAMPLER, TOY_SD3

CPU = torch.device("cpu")
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
GUIDED = replace(SAMPLER, guidance_scale=2.0, added_prompt="sharp", negative_prompt="blurry")
PROMPT_OPTIONS = ["sampler.added_prompt=sharp", "sampler.negative_prompt=blurry", "sampler.t5_tokens=8"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a pipeline (`model`) and an LR stream over it with its prompt embeddings (`weights`)."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(TOY_SD3, folder / "model")
    net = DiT4SRTransformer(Backbone(str(TOY_SD3), "float32", 8).transformer, Variant(injection_scale=1.2))
    randomise(net.lr_stream)
    save_part(part_of(net, base_of(net, str(folder / "model"))), folder / "weights" / "lr_stream.safetensors")
    assert convert(folder, "input=weights", f"output=weights/{PROMPTS}") is None
    return folder


@pytest.fixture
def shipped(made, tmp_path) -> Path:
    """A copy of it in `tmp_path`."""
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)


def convert(folder: Path, *arguments: str) -> str | None:
    backbone = [f"model.backbone.name={folder / 'model'}", "model.backbone.dtype=float32"]
    return call("dit4sr_pl.convert", *arguments, *backbone, *PROMPT_OPTIONS, cwd=folder)


def without_text(model: Path) -> None:
    """Removes the text encoders and tokenizers of a pipeline."""
    for folder in [*model.glob("text_encoder*"), *model.glob("tokenizer*")]:
        shutil.rmtree(folder)


def restored(folder: Path, captions=("", ""), sampler=GUIDED, dtype="float32", embeddings=True) -> torch.Tensor:
    backbone = Backbone(str(folder / "model"), dtype, sampler.t5_tokens)
    weights = folder / "weights" / "lr_stream.safetensors"
    if not embeddings:
        weights = shutil.copy(weights, folder / "lr_stream.safetensors")
    lr = torch.rand(2, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    return Restorer.load(backbone, sampler, weights, CPU)(lr, (32, 40), list(captions), ["a", "b"], seed=0)


def test_without_captions_restoring_needs_no_text_encoder_and_gives_the_same(shipped):
    expected, captioned = (restored(shipped, captions, embeddings=False) for captions in (("", ""), ("", "a cat")))
    torch.testing.assert_close(restored(shipped, ("", "a cat")), captioned, atol=1e-5, rtol=0)
    for name in ENCODERS:  # they raise when they are read
        (shipped / "model" / name / "model.safetensors").write_bytes(b"none")
    assert torch.equal(restored(shipped), expected)
    without_text(shipped / "model")
    assert torch.equal(restored(shipped), expected)
    with pytest.raises(FileNotFoundError, match="its text encoders cannot be read"):
        restored(shipped, ("", "a cat"))


@pytest.mark.slow
def test_the_commands_restore_without_text_encoders(shipped):
    without_text(shipped / "model")
    write_image(shipped / "lr" / "photo.png", torch.rand(3, 8, 10))
    write_image(shipped / "hr" / "photo.png", torch.rand(3, 32, 40))
    options = ["checkpoint=weights/lr_stream.safetensors", "backbone=tiny_sd3", f"model.backbone.name={shipped}/model"]
    options += [*PROMPT_OPTIONS, "sampler.steps=2", "sampler.smallest=1", "sampler.guidance_scale=2", "device=cpu"]
    assert call("dit4sr_pl.restore", "input=lr", "output=restored", *options, cwd=shipped) is None
    dataset = ["dataset=folder", f"dataset.folder={shipped}", "dataset.lr=lr", "dataset.hr=hr", "metrics=[psnr]"]
    assert call("dit4sr_pl.evaluate", *dataset, "output=evaluated", *options, cwd=shipped) is None
    line = call("dit4sr_pl.restore", "input=lr", "output=captioned", "prompt=a cat", *options, cwd=shipped)
    assert "its text encoders cannot be read" in line and "\n" not in line
    pictures = [read_image(shipped / place / "photo.png") for place in ("restored", "evaluated/images")]
    assert torch.equal(*pictures) and pictures[0].shape == (3, 32, 40)


def test_the_file_holds_what_the_encoders_give_and_names_what_it_belongs_to(shipped):
    read = ShippedPrompts.read(shipped / "weights" / PROMPTS)
    assert set(read.held) == {"", "sharp", "blurry"} and read.t5_tokens == 8
    assert set(read.text_encoders) == set(TEXT_PARTS) and all(read.text_encoders.values())
    encoder = Backbone(str(TOY_SD3), "float32", 8).prompts
    for prompt, pair in read.held.items():
        assert all(torch.equal(*each) for each in zip(pair, encoder([prompt], CPU), strict=True))


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ("encoder", "made with another text_encoder_2"),
        ("token", "made with another text_encoder"),
        ("words", "made with another tokenizer_2"),
        ("t5", "made with a text_encoder_3"),
        ("base", "made for another base model"),
        ("tokens", "made with t5_tokens=8, and this is 9"),
        ("dtype", "made in torch.float32, and this is torch.bfloat16"),
        ("width", "of another width than this base model reads"),
    ],
)
def test_embeddings_of_something_else_are_not_used_and_a_line_says_why(shipped, caplog, wrong, reason):
    sampler, dtype, file = GUIDED, "float32", shipped / "weights" / PROMPTS
    if wrong == "encoder":
        change_weight(shipped / "model" / "text_encoder_2", lambda weight: weight + 0.1)
    elif wrong == "token":  # one more, as textual inversion adds it
        change_weight(shipped / "model" / "text_encoder", lambda weight: torch.cat([weight, weight[:1]]))
    elif wrong == "words":
        (shipped / "model" / "tokenizer_2" / "vocab.json").write_text('{"a": 0}')
    elif wrong == "t5":
        index = json.loads((shipped / "model" / "model_index.json").read_text())
        index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
        (shipped / "model" / "model_index.json").write_text(json.dumps(index))
    elif wrong == "base":
        rewrite(file, lambda header, tensors: header.update(fingerprint="0" * 32))
    elif wrong == "width":
        rewrite(file, narrow)
    sampler = replace(sampler, t5_tokens=9) if wrong == "tokens" else sampler
    dtype = "bfloat16" if wrong == "dtype" else dtype
    backbone = Backbone(str(shipped / "model"), dtype, sampler.t5_tokens)
    backbone.take_shipped_prompts(shipped / "weights" / "lr_stream.safetensors")
    assert f"{PROMPTS}: not used, since it was {reason}; text encoders are read" in caplog.text
    assert "prompts" not in vars(backbone)  # which then reads text encoders


def change_weight(folder: Path, change) -> None:
    """Changes the largest weight of a text encoder."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = max(weights, key=lambda name: weights[name].numel())
    save_file(weights | {name: change(weights[name])}, path, {"format": "pt"})


def narrow(header: dict, tensors: dict) -> None:
    """Makes embeddings half as wide, with the hashes of what they are then."""
    from dit4sr_pl.backbone.prompt_cache import embeddings_hash

    for key in header["hashes"]:
        tensors[f"{key}.embeds"] = tensors[f"{key}.embeds"][:, ::2].contiguous()
        header["hashes"][key] = embeddings_hash(tensors[f"{key}.embeds"], tensors[f"{key}.pooled"])


def rewrite(path: Path, change) -> None:
    """Writes a file again with another header or other tensors."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["embeddings"])
    tensors = load_file(path)
    change(header, tensors)
    save_file(tensors, path, {"embeddings": json.dumps(header)})


@pytest.mark.parametrize("damage", ["cut", "changed", "no header", "empty"])
def test_a_damaged_file_is_refused_in_one_line(shipped, damage):
    path = shipped / "weights" / PROMPTS
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "changed":
        rewrite(path, lambda header, tensors: tensors.update({key: value + 1 for key, value in tensors.items()}))
    elif damage == "no header":
        save_file(load_file(path), path)
    else:
        rewrite(path, lambda header, tensors: header.update(prompts={}))
    with pytest.raises(ValueError, match=f"{PROMPTS}: .*; delete it, and text encoders are read instead") as error:
        restored(shipped)
    assert "\n" not in str(error.value)


def test_files_that_were_not_downloaded_are_not_compared(shipped, caplog):
    """An encoder of which a part is missing, as after a download that was cut off, counts as one that is not there."""
    encoder = shipped / "model" / "text_encoder_3"
    (encoder / "model.safetensors").rename(encoder / "model-00001-of-00002.safetensors")
    (shipped / "model" / "text_encoder" / "model.safetensors").unlink()
    backbone = Backbone(str(shipped / "model"), "float32", 8)
    backbone.take_shipped_prompts(shipped / "weights")
    assert isinstance(backbone.prompts, HeldPrompts) and not caplog.text


@pytest.mark.slow
def test_convert_writes_them_next_to_what_it_writes(shipped):
    assert "exists; give another output, or overwrite" in convert(shipped, "input=weights", f"output=weights/{PROMPTS}")
    assert convert(shipped, "input=weights", "output=release", "prompt_embeddings=true") is None
    assert convert(shipped, "input=release", "output=again/q.safetensors", "prompt_embeddings=true") is None
    expected = ShippedPrompts.read(shipped / "weights" / PROMPTS).held
    for weights in ("release", "release/transformer", "again/q.safetensors"):
        held = ShippedPrompts.beside(shipped / weights).held
        assert held.keys() == expected.keys()
        assert all(torch.equal(*pair) for prompt in held for pair in zip(held[prompt], expected[prompt], strict=True))
    other = shutil.copytree(shipped / "model", shipped / "other")
    weights = other / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: weight + 0.1 for name, weight in load_file(weights).items()}, weights, {"format": "pt"})
    (shipped / "model").rename(shipped / "former")
    other.rename(shipped / "model")
    line = convert(shipped, "input=weights", f"output=other/{PROMPTS}")
    assert line.startswith("error: weights: trained over") and "\n" not in line


@pytest.mark.slow
def test_they_go_to_the_hub_and_come_back_with_the_weights(shipped, tmp_path, monkeypatch):
    with serving(LocalHub(), monkeypatch, tmp_path) as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert convert(shipped, "input=weights", "output=hub:me/mine/deep", "prompt_embeddings=true") is None
        repo = hub.repos["me/mine"]
        files = repo.commits[repo.refs["main"]]
        assert f"deep/{PROMPTS}" in files and f"With `{PROMPTS}` next to it".encode() in files["deep/README.md"]
        without_text(shipped / "model")
        shutil.rmtree(shipped / "weights")
        shutil.copytree(checkpoint_file("hub:me/mine/deep").parent, shipped / "weights")
    assert restored(shipped).shape == (2, 3, 32, 40)


@pytest.mark.slow
def test_text_encoders_of_a_hub_model_are_not_downloaded_until_a_caption_comes(shipped, tmp_path, monkeypatch):
    with serving(LocalHub(), monkeypatch, tmp_path) as hub:
        hub.add("toy/sd3", TOY_SD3)
        part = load_part(shipped / "weights" / "lr_stream.safetensors")
        save_part(replace(part, base=part.base | {"name": "toy/sd3"}), shipped / "weights" / "lr_stream.safetensors")
        hub.add("me/mine", shipped / "weights")
        backbone, weights = Backbone("toy/sd3", "float32", 8), "hub:me/mine"
        lr = torch.rand(1, 3, 8, 10)
        ours = Restorer.load(backbone, GUIDED, weights, CPU)(lr, (32, 40), [""], ["0"], seed=0)
        fields = {key: value for key, value in vars(GUIDED).items() if key != "solver"}
        pipe = DiT4SRPipeline.from_pretrained(weights, sampler=fields, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        torch.testing.assert_close(pipe(lr, output_type="pt").images, ours, atol=1e-5, rtol=0)
        of_text = [request for request in hub.requests if "/text_encoder" in request or "/tokenizer" in request]
        assert of_text == [] and pipe.text_encoder is None
        pipe(lr, prompt="a cat")
        assert pipe.text_encoder_3 is not None


def test_convert_takes_the_backbone_and_the_prompts_of_the_weights(tmp_path):
    weights = ASSETS / "tiny-dit4sr" / "lr_stream.safetensors"
    assert call("dit4sr_pl.convert", f"input={weights}", f"output=tiny/{PROMPTS}", cwd=tmp_path) is None
    read = ShippedPrompts.read(tmp_path / "tiny" / PROMPTS)
    assert list(read.held) == [""] and read.t5_tokens == 8 and read.held[""][0].dtype == torch.float32
    backbone = Backbone("tiny-sd3", "float32", 8)
    backbone.take_shipped_prompts(tmp_path / "tiny")
    assert isinstance(backbone.prompts, HeldPrompts) and "text_encoders" not in vars(backbone)


@pytest.fixture
def load(shipped):
    """A function that loads a pipeline of the weights, or by another name."""

    def load(name=shipped / "weights" / "lr_stream.safetensors", **arguments) -> DiT4SRPipeline:
        fields = {key: value for key, value in vars(GUIDED).items() if key != "solver"}
        arguments = arguments if name.is_dir() else {"sampler": fields, "dtype": torch.float32} | arguments
        pipe = DiT4SRPipeline.from_pretrained(name, **arguments)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


@pytest.mark.slow
def test_the_pipeline_leaves_text_encoders_out_until_a_caption_comes(shipped, load):
    lr = torch.rand(2, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    file = shutil.copy(shipped / "weights" / "lr_stream.safetensors", shipped / "alone.safetensors")
    whole, pipe = load(Path(file)), load()
    restore = partial(DiT4SRPipeline.__call__, image=lr, output_type="pt")
    assert whole.text_encoder is not None and pipe.text_encoder is None and pipe.tokenizer_3 is None
    assert torch.equal(restore(pipe).images, restore(whole).images) and pipe.text_encoder is None
    captioned = restore(whole, prompt=["a cat", ""]).images
    torch.testing.assert_close(restore(pipe, prompt=["a cat", ""]).images, captioned, atol=1e-5, rtol=0)
    assert pipe.text_encoder_3 is not None
    offloaded = load()
    offloaded.enable_model_cpu_offload(device="cpu")
    torch.testing.assert_close(restore(offloaded, prompt=["a cat", ""]).images, captioned, atol=1e-5, rtol=0)
    assert hasattr(offloaded.text_encoder_3, "_hf_hook")
    offloaded.remove_all_hooks()

    load().save_pretrained(shipped / "saved")
    assert (shipped / "saved" / "text_encoder_3" / "model.safetensors").is_file()
    shutil.rmtree(shipped / "model")
    saved = load(shipped / "saved")
    assert saved.text_encoder is None and torch.equal(restore(saved).images, restore(whole).images)
    assert restore(saved, prompt="a cat").images.shape == (2, 3, 32, 40) and saved.text_encoder is not None
    without_text(shipped / "saved")
    bare = load(shipped / "saved")
    assert torch.equal(restore(bare).images, restore(whole).images)
    with pytest.raises((OSError, ValueError)):
        restore(bare, prompt="a cat")


def test_a_pipelines_own_components_decide(shipped, load, caplog):
    nothing = dict.fromkeys([f"{part}{i}" for part in ("tokenizer", "text_encoder") for i in ("", "_2", "_3")])
    pipe, lr = load(**nothing), torch.rand(1, 3, 8, 10)
    assert pipe(lr, output_type="pt").images.shape == (1, 3, 32, 40)
    with pytest.raises(ValueError, match="a prompt without embeddings, in a pipeline without text encoders"):
        pipe(lr, prompt="a cat")
    assert load(dtype=torch.bfloat16).text_encoder.dtype == torch.bfloat16
    assert "not used, since it was made in torch.float32" in caplog.text
