"""Training runs of a few steps over a toy backbone, and readers of their files."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.images.files import write_image
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.restoration.sampler import Sampler
from dit4sr_pl.train import train
from testing import ROOT

# An SD3 pipeline with random weights and a transformer of two blocks, one of them with dual attention. A training step
# over it takes a tenth of the time that it takes over tiny-sd3.
TOY_SD3 = ROOT / "tests" / "made_at_6d90829" / "toy-sd3"
CONTROLNET = ["model=tiny_sd3_controlnet", "model.network.num_layers=1"]
SAMPLER = Sampler(
    solver=FlowMatchEulerDiscreteScheduler.from_config,
    steps=3,
    start="noise",
    strength=1.0,
    guidance_scale=1.0,
    added_prompt="",
    negative_prompt="",
    t5_tokens=8,
    tile=32,
    overlap=12,
    tile_memory=0.05,
    smallest=1,
    vae_tile=64,
    color="none",
)
# What conf/sampler/tiny_sd3.yaml changes.
SHIPPED = {"start": "lr", "strength": 0.85, "color": "wavelet_adain", "wavelet_levels": 3}


def toy(photos: Path, output: Path) -> list[str]:
    """Returns the overrides of a small run into a folder."""
    return [*small(photos), f"output={output}"]


def small(photos: Path) -> list[str]:
    """Returns overrides that make any run small: two steps of two images over the toy backbone, then a validation."""
    return [
        "data=folder",
        f"data.folders=[{photos}]",
        f"data.validation_folders=[{photos}]",
        "data.validation_limit=2",
        "data.crop_size=64",
        "data.validation_crop=64",
        "data.batch_size=2",
        "data.num_workers=0",
        "data.min_gradient=0",
        "model.compile=false",
        f"model.backbone.name={TOY_SD3}",
        "sampler.steps=1",
        "sampler.smallest=1",
        "trainer.max_steps=2",
        "trainer.precision=32-true",  # CPUs without bfloat16 take seconds for a step in it
        "trainer.val_check_interval=2",
        "trainer.log_every_n_steps=1",
        "callbacks.checkpoint.every_n_train_steps=2",
        "~callbacks.progress",
        "+trainer.enable_progress_bar=false",
    ]


def train_toy(photos: Path, output: Path, *overrides: str) -> dict[str, float]:
    """Runs a small training into a folder and returns its scores."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return train(compose("train", [*toy(photos, output), *overrides]))


def write_toy_photos(folder: Path) -> Path:
    """Writes five smooth photos of 80x80 pixels, `0.png` to `4.png`, and returns their folder."""
    for i in range(5):
        picture = enlarge(torch.rand(1, 3, 20, 20, generator=generator("cpu", i)), (80, 80))
        write_image(folder / f"{i}.png", picture[0])
    return folder


def noisy(path: Path) -> None:
    """Adds noise to the weights in a file."""
    save_file({name: weight + 0.3 * torch.randn_like(weight) for name, weight in load_file(path).items()}, path)


def events(folder: Path) -> EventAccumulator:
    """Returns all that TensorBoard reads of a run."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()


def losses(folder: Path) -> list[float]:
    """Returns the losses of a run in TensorBoard."""
    return [event.value for event in events(folder).Scalars("train/loss")]
