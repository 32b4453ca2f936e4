"""A teacher over the toy backbone, and what trains students of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.model import DiT4SRTransformer, Variant, save_part
from dit4sr_pl.model.trained_part import base_of, part_of
from dit4sr_pl.training.students.module import StudentModule
from testing.networks import randomise
from testing.toy_runs import TOY_SD3

GUIDED = ["student.teaching.guidance_scale=3.0", "student.teaching.negative_prompt=blurry"]


@pytest.fixture(scope="session")
def teacher(toy_backbone, tmp_path_factory) -> Path:
    """Returns the file of a teacher with random weights, with another factor of LR Injection than trainings have."""
    net = DiT4SRTransformer(toy_backbone.transformer, Variant(injection_scale=1.2))
    randomise(net.lr_stream)
    path = tmp_path_factory.mktemp("teacher") / "lr_stream.safetensors"
    save_part(part_of(net, base_of(net, str(TOY_SD3))), path)
    return path


@pytest.fixture(scope="session")
def make_student(teacher) -> Callable[..., StudentModule]:
    """Returns a function that makes the module of an experiment with further overrides."""

    def make(experiment: str, *overrides: str) -> StudentModule:
        toy = [f"model.backbone.name={TOY_SD3}", f"student.teacher={teacher}", "output=x", "sampler.smallest=1"]
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            cfg = compose("train", [f"experiment={experiment}", *toy, "model.compile=false", *overrides])
        return instantiate(cfg.model)

    return make


def toy_batch(module: StudentModule, count: int = 2, **changed: object) -> dict:
    """Returns a batch of latents with all inputs of a step."""
    torch.manual_seed(5)
    latents = {name: torch.randn(count, 4, 8, 8) for name in ("clean", "lr_latent")}
    batch = latents | {"position": torch.arange(count), "prompt": ["a cat", ""][:count]} | changed
    return batch | module.step_inputs(batch)
