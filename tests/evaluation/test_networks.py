"""Evaluations of networks that have the same weights and other switches, or another factor of LR Injection."""

import json
import shutil
from dataclasses import replace

import pytest
from hydra import compose, initialize_config_dir

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.comparison.rows import Run, make_rows
from dit4sr_pl.evaluate import evaluate
from dit4sr_pl.model import Variant, load_part, save_part
from dit4sr_pl.restoration.sampler import Sampler
from dit4sr_pl.scores.results import read_result
from testing import ROOT
from testing.made_up_scores import draw_scores, made_up
from testing.toy_runs import TOY_SD3, noisy

MADE = ROOT / "tests" / "made_at_6d90829"


def evaluation(checkpoint, output, *overrides):
    """Evaluates a checkpoint on two toy pairs and returns the result."""
    arguments = ["dataset=folder", f"dataset.lr={MADE / 'pairs/lr'}", f"dataset.hr={MADE / 'pairs/hr'}"]
    arguments += [f"checkpoint={checkpoint}", f"output={output}", "metrics=[psnr]", f"model.backbone.name={TOY_SD3}"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        evaluate(compose("evaluate", [*arguments, "sampler.steps=1", "sampler.smallest=1", *overrides]))
    return read_result(output)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Files with the same weights and other network configs."""
    folder, part = tmp_path_factory.mktemp("trained"), load_part(MADE / "run" / "lr_stream.safetensors")
    changes = {"own": {}, "scaled": {"injection_scale": 40.0}, "no_lr_residual": {"lr_residual": False}}
    for name, change in changes.items():
        config = part.network_config | {"variant": part.network_config["variant"] | change}
        save_part(replace(part, network_config=config), folder / f"{name}.safetensors")
    return folder


@pytest.mark.slow
def test_equal_weights_in_another_network_are_another_evaluation(trained, tmp_path):
    own = evaluation(trained / "own.safetensors", tmp_path / "own")
    for name in ("scaled", "no_lr_residual"):
        with pytest.raises(ValueError, match=r"holds other scores \(method\)"):
            evaluation(trained / f"{name}.safetensors", tmp_path / "own")
        other = evaluation(trained / f"{name}.safetensors", tmp_path / name)
        assert other.weights_hash == own.weights_hash and other.identity_hash != own.identity_hash
        assert other.scores != own.scores and other.network != own.network
    assert read_result(tmp_path / "own") == own


def test_the_factor_of_lr_injection_is_an_option_and_belongs_to_the_identity(trained, tmp_path):
    scaled = evaluation(trained / "scaled.safetensors", tmp_path / "scaled")
    given = evaluation(trained / "own.safetensors", tmp_path / "given", "injection_scale=40")
    assert given.scores == scaled.scores and given.network == scaled.network
    with pytest.raises(ValueError, match=r"holds other scores \(method\)"):
        evaluation(trained / "own.safetensors", tmp_path / "given")
    assert evaluation(trained / "scaled.safetensors", tmp_path / "scaled", "injection_scale=40.0") == scaled


@pytest.mark.slow
def test_another_autoencoder_is_another_evaluation_unless_none_is_recorded(trained, tmp_path):
    model, output = shutil.copytree(TOY_SD3, tmp_path / "sd3"), tmp_path / "out"
    own = evaluation(trained / "own.safetensors", output, f"model.backbone.name={model}")
    noisy(model / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"holds other scores \(method\): method.base.parts.vae was"):
        evaluation(trained / "own.safetensors", output, f"model.backbone.name={model}")
    settings = json.loads((output / "settings.json").read_text())
    del settings["method"]["base"]["parts"]  # as before 0.2
    (output / "settings.json").write_text(json.dumps(settings))
    assert evaluation(trained / "own.safetensors", output, f"model.backbone.name={model}") == own


def test_captions_reach_the_network_filtered_and_belong_to_the_identity(trained, tmp_path, monkeypatch):
    (tmp_path / "captions").mkdir()
    for name in "01":
        (tmp_path / "captions" / f"{name}.txt").write_text("A cat. Its background is out of focus.")
    captions = [f"dataset.captions={tmp_path / 'captions'}"]
    asked, prompt = [], Sampler.prompt
    monkeypatch.setattr(Sampler, "prompt", lambda self, caption: asked.append(caption) or prompt(self, caption))
    filtered = evaluation(trained / "own.safetensors", tmp_path / "out", *captions)
    assert asked == ["A cat."] * 2
    with pytest.raises(ValueError, match=r"holds other scores \(files\)"):
        evaluation(trained / "own.safetensors", tmp_path / "out", *captions, "captions.dropped_words=[]")
    for name in "01":
        (tmp_path / "captions" / f"{name}.txt").write_text("A cat.")
    assert evaluation(trained / "own.safetensors", tmp_path / "out", *captions) == filtered


def test_compare_does_not_average_seeds_of_different_networks():
    networks = [{"network": "dit4sr", "variant": Variant(injection_scale=scale).as_dict()} for scale in (1.0, 1.2)]
    first, second = (made_up(draw_scores(seed), seed=seed, network=networks[seed]) for seed in (0, 1))
    runs = {"first": first, "second": second, "old": made_up(draw_scores(2), seed=2)}
    with pytest.raises(ValueError, match=r"first and second: seeds of DiT4SR with .* \(injection_scale 1.0 and 1.2\)"):
        make_rows([Run(name, result) for name, result in runs.items()], ["psnr"])
    (row,) = make_rows([Run("first", first), Run("old", runs["old"])], ["psnr"])["RealSR"]
    assert len(row.runs) == 2
