"""The backbone that a command takes for a checkpoint. No PyTorch, unless the checkpoint itself must be read with it."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.hub import RELEASE_REPO, RELEASED_BASE, HubAddress, locate
from dit4sr_pl.common.part_header import base_name

CHOICES = ("backbone=", "model.backbone.name=")  # overrides by which a user chooses a backbone


def follow_checkpoint(cfg: DictConfig, checkpoint: str | None = None) -> DictConfig:
    """Returns a command's config with the backbone that its checkpoint was trained over, and with that one's sampler.

    The config stays as it is if the user chose a backbone, or if `conf/backbone/` has none of that name.

    Args:
        cfg: the config.
        checkpoint: the checkpoint; None: the config's.

    Raises:
        FileNotFoundError: the checkpoint does not exist, or cannot be read on the hub.
        ValueError: the checkpoint is truncated or of another kind.
    """
    given = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else None
    if given is None or any(override.lstrip("+").startswith(CHOICES) for override in given):
        return cfg
    name = base_of_checkpoint(cfg.checkpoint if checkpoint is None else checkpoint)
    if name == cfg.model.backbone.name or (option := backbone_option(name)) is None:
        return cfg
    return hydra.compose(HydraConfig.get().job.config_name, [*given, f"backbone={option}"])


def base_of_checkpoint(checkpoint: str) -> str:
    """Returns the name of the base that a checkpoint was trained over; errors are those of `follow_checkpoint`."""
    place = locate(checkpoint)
    if isinstance(place, HubAddress):
        if place.repo == RELEASE_REPO:
            return RELEASED_BASE  # known before the download
        from dit4sr_pl.model.checkpoint_files import fetch

        place = fetch(place)
    if place.is_dir():
        return RELEASED_BASE
    if place.suffix == ".ckpt":
        from dit4sr_pl.model import load_part

        return load_part(place).base["name"]
    return base_name(place)


def backbone_option(name: str) -> str | None:
    """Returns the option in `conf/backbone/` of a model's name; None: there is none."""
    for file in sorted(Path(conf_folder(), "backbone").glob("*.yaml")):
        if OmegaConf.select(OmegaConf.load(file), "model.backbone.name") == name:
            return file.stem
    return None
