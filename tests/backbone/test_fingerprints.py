"""Fingerprints of a backbone's parts see other contents, and no other way to store the same ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit4sr_pl.backbone.fingerprints import PARTS, check_parts, differing, part_fingerprints
from testing.toy_runs import TOY_SD3, noisy


@pytest.fixture
def model(tmp_path) -> Path:
    return shutil.copytree(TOY_SD3, tmp_path / "sd3")


def changed(model: Path) -> list[str]:
    """Returns the parts that differ from the toy backbone's."""
    return differing(part_fingerprints(str(model)), part_fingerprints(str(TOY_SD3)))


def test_every_part_has_a_fingerprint_and_a_part_that_is_not_there_has_none(model):
    assert set(part_fingerprints(str(model))) == set(PARTS)
    shutil.rmtree(model / "text_encoder_3")
    assert set(PARTS) - set(part_fingerprints(str(model))) == {"text_encoder_3"}
    assert "vae" not in part_fingerprints(str(model), known=["vae"])
    assert part_fingerprints("nobody/nothing") == part_fingerprints("not: a name") == {}


def test_another_precision_or_other_shards_or_a_variant_are_the_same_parts(model):
    vae = model / "vae/diffusion_pytorch_model.safetensors"
    save_file({name: weight.bfloat16() for name, weight in load_file(vae).items()}, vae)
    whole = model / "text_encoder/model.safetensors"
    weights = load_file(whole)
    names = sorted(weights)
    shards = {name: f"model-{1 + index % 2}.safetensors" for index, name in enumerate(names)}
    for shard in set(shards.values()):
        save_file({name: weights[name] for name in names if shards[name] == shard}, whole.with_name(shard))
    whole.rename(whole.with_name("model.fp16.safetensors"))
    (whole.parent / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    config = model / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_diffusers_version": "9", "use_new_thing": False}))
    assert changed(model) == []


def test_other_weights_words_and_settings_are_other_parts(model):
    noisy(model / "vae/diffusion_pytorch_model.safetensors")
    noisy(model / "text_encoder_2/model.safetensors")
    config = model / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift": 1.5}))
    (model / "tokenizer/tokenizer.json").write_text((model / "tokenizer/tokenizer.json").read_text() + " ")
    assert changed(model) == ["vae", "scheduler", "text_encoder_2", "tokenizer"]


def test_weights_in_pytorchs_format_are_compared_too(model):
    for folder, value in ((model, 0.0), (model.with_name("other"), 1.0)):
        (folder / "vae").mkdir(parents=True, exist_ok=True)
        (folder / "vae/diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
        torch.save({"weight": torch.full([999], value)}, folder / "vae/diffusion_pytorch_model.bin")
    ours, theirs = (part_fingerprints(str(folder))["vae"] for folder in (model, model.with_name("other")))
    assert ours != theirs


def test_a_part_that_cannot_be_read_has_no_fingerprint(model):
    path = model / "vae/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    assert "vae" not in part_fingerprints(str(model))


def test_another_autoencoder_is_refused_and_other_text_encoders_are_told(caplog):
    ours = {"vae": "a", "text_encoder": "b"}
    check_parts("sd3", ours, {}, "file")
    check_parts("sd3", ours, ours | {"tokenizer": "c"}, "file")
    assert not caplog.messages
    check_parts("sd3", ours, {"vae": "a", "text_encoder": "c"}, "file")
    assert caplog.messages == ["file: trained over other parts than sd3 has now: text_encoder"]
    with pytest.raises(ValueError, match="file: trained over another autoencoder than the vae of sd3"):
        check_parts("sd3", ours, {"vae": "b", "text_encoder": "c"}, "file")
