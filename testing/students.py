"""Teachers with random weights over the toy backbone, and what trains students of them."""

from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.model import DiT4SRTransformer, Variant, save_part
from dit4sr_pl.model.trained_part import base_of, part_of
from dit4sr_pl.training.students.module import StudentModule
from testing.networks import randomise
from testing.toy_runs import TOY_SD3

GUIDED = ["student.teaching.guidance_scale=3.0", "student.teaching.negative_prompt=blurry"]


def write_teacher(backbone: Backbone, path: Path) -> Path:
    """Writes a teacher with random weights, and with another factor of LR Injection than trainings have."""
    net = DiT4SRTransformer(backbone.transformer, Variant(injection_scale=1.2))
    randomise(net.lr_stream)
    save_part(part_of(net, base_of(net, str(TOY_SD3))), path)
    return path


def make_student(teacher: Path, *overrides: str) -> StudentModule:
    """Returns the module that a training with these overrides makes."""
    toy = [f"model.backbone.name={TOY_SD3}", f"student.teacher={teacher}", "output=x", "sampler.smallest=1"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("train", [*overrides[:1], *toy, "model.compile=false", *overrides[1:]])
    return instantiate(cfg.model)


def losses_of(module: StudentModule, batch: dict, steps: int, learning_rate: float) -> list[float]:
    """Returns the losses of a few steps on one batch."""
    optimizer, losses = torch.optim.Adam(module.parameters(), learning_rate), []
    for _ in range(steps):
        loss = module.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def toy_batch(module: StudentModule, count: int = 2) -> dict:
    """Returns a batch of latents with all inputs of a step."""
    torch.manual_seed(5)
    latents = {name: torch.randn(count, 4, 8, 8) for name in ("clean", "lr_latent")}
    batch = latents | {"position": torch.arange(count), "prompt": ["a cat", ""][:count]}
    return batch | module.step_inputs(batch)
