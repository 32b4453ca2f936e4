"""A backbone brings its own sampler, and no command cuts the prompts of a real T5."""

import json
import shutil

import pytest
from diffusers import StableDiffusion3Pipeline
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from dit4sr_pl.backbone.text_encoder import PromptEncoder
from dit4sr_pl.backbone.text_length import TOKENIZER, longest_prompt
from dit4sr_pl.cli.command import conf_folder
from testing.stand_ins import run_restore
from testing.toy_runs import TOY_SD3

PAPER = {"steps": 40, "guidance_scale": 8.0, "t5_tokens": 256, "tile": 64, "overlap": 24, "smallest": 64}
TINY = {"steps": 20, "guidance_scale": 1.0, "t5_tokens": 8, "tile": 32, "overlap": 12, "smallest": 16}


@pytest.mark.parametrize(
    "command, overrides, expected",
    [
        ("restore", [], TINY | {"steps": 12, "start": "lr"}),
        ("restore", ["backbone=sd35_medium"], PAPER),
        ("restore", ["backbone=sd35_medium", "sampler=tiny"], TINY),
        ("restore", ["sampler/solver=dpm", "backbone=sd35_medium", "sampler.steps=10"], PAPER | {"steps": 10}),
        ("evaluate", ["backbone=sd35_medium"], PAPER),
        ("app", ["backbone=sd35_medium"], PAPER),
        ("prepare", ["backbone=sd35_medium"], PAPER),
        ("train", [], TINY | {"start": "noise"}),
        ("train", ["model=dit4sr"], PAPER),
        ("train", ["model=sd3_controlnet"], PAPER),
        ("train", ["model=tiny_sd3_controlnet"], TINY),
        ("train", ["model=dit4sr", "sampler=tiny"], TINY),
        ("train", ["experiment=paper_r1"], PAPER),
    ],
)
def test_a_backbone_brings_its_sampler_with_it_and_a_given_one_wins(command, overrides, expected):
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose(command, overrides)
    assert {key: cfg.sampler[key] for key in expected} == expected
    assert bool(cfg.sampler.negative_prompt) == bool(cfg.sampler.added_prompt) == (expected["tile"] == 64)
    real = any("sd35" in text or "dit4sr" in text or "sd3_c" in text or "paper" in text for text in overrides)
    real &= "model=tiny_sd3_controlnet" not in overrides
    assert cfg.model.backbone.dtype == ("bfloat16" if real else "float32")


def test_the_authors_demo_is_a_sampler():
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        sampler = instantiate(compose("restore", ["backbone=sd35_medium", "sampler=released_demo"]).sampler)
    assert (sampler.steps, sampler.guidance_scale, sampler.overlap, sampler.tile) == (20, 7.0, 16, 64)
    assert (sampler.t5_tokens, sampler.process_size, sampler.color) == (256, 512, "adain")
    assert sampler.prompt("A cat.").startswith("A cat. Cinematic, perfect without deformations, ultra HD, camera")


@pytest.fixture
def with_real_t5(tmp_path):
    """A copy of the toy pipeline whose T5 takes 512 tokens, as SD3's does."""
    folder = tmp_path / "sd3"
    shutil.copytree(TOY_SD3, folder)
    config = json.loads((folder / TOKENIZER).read_text())
    (folder / TOKENIZER).write_text(json.dumps(config | {"model_max_length": 512}))
    return folder


def test_the_length_of_a_t5s_prompts_is_read_from_its_small_files(with_real_t5):
    assert longest_prompt("tiny-sd3") == longest_prompt(str(TOY_SD3)) == 8
    assert longest_prompt(str(with_real_t5)) == 512
    assert longest_prompt("stabilityai/stable-diffusion-3.5-medium") >= 77  # its config is in this package
    shutil.rmtree(with_real_t5 / "tokenizer_3")
    assert longest_prompt(str(with_real_t5)) == 0  # toy T5 by its vocabulary
    shutil.rmtree(with_real_t5 / "text_encoder_3")
    assert longest_prompt(str(with_real_t5)) == longest_prompt("nobody/nothing") == 0


def test_a_real_t5_cut_to_eight_tokens_is_refused_in_one_line_before_anything_is_read(
    with_real_t5, tmp_path, monkeypatch, photos
):
    given = [f"input={photos / '0.png'}", f"output={tmp_path / 'out'}"]
    for overrides in (["backbone=sd35_medium", "sampler=tiny"], [f"model.backbone.name={with_real_t5}"]):
        message = run_restore(monkeypatch, *given, *overrides)
        assert message.startswith("error: t5_tokens=8: ") and "give backbone=sd35_medium" in message
        assert "\n" not in message
    pipeline = StableDiffusion3Pipeline.from_pretrained(with_real_t5, transformer=None, vae=None)
    with pytest.raises(ValueError, match="t5_tokens=76: this model has a real T5"):
        PromptEncoder(pipeline, 76)
    assert PromptEncoder(pipeline, 77).t5_tokens == 77
