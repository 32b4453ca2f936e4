"""A command takes over from its checkpoint the backbone, and how a student samples. No PyTorch, unless the checkpoint
itself must be read with it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.hub import RELEASE_REPO, RELEASED_BASE, HubAddress, locate
from dit4sr_pl.common.part_header import network_and_base
from dit4sr_pl.common.students import fixed_settings, refusal

CHOICES = ("backbone", "model.backbone.name")  # keys of overrides by which a user chooses a backbone


def follow_checkpoint(cfg: DictConfig, checkpoint: str | None = None) -> DictConfig:
    """Returns a command's config with the backbone that its checkpoint was trained over, with that one's sampler, and
    with the settings of the sampler that a student fixes.

    The backbone stays as it is if the user chose one, or if `conf/backbone/` has none of that name.

    Args:
        cfg: the config.
        checkpoint: the checkpoint; None: the config's.

    Raises:
        FileNotFoundError: the checkpoint does not exist, or cannot be read on the hub.
        ValueError: the checkpoint is truncated or of another kind, or a student that cannot have what the user gave.
    """
    if not HydraConfig.initialized():
        return cfg
    given = list(HydraConfig.get().overrides.task)
    values = dict(override.lstrip("+~").partition("=")[::2] for override in given)
    checkpoint = cfg.checkpoint if checkpoint is None else checkpoint
    network_config, base = read_checkpoint_header(checkpoint)
    added = []
    chosen = any(key in values for key in CHOICES) or base == cfg.model.backbone.name
    if not chosen and (option := backbone_option(base)) is not None:
        added.append(f"backbone={option}")
    added += sampler_overrides(cfg, values, checkpoint, network_config.get("student"))
    return hydra.compose(HydraConfig.get().job.config_name, [*given, *added]) if added else cfg


def sampler_overrides(
    cfg: DictConfig, values: Mapping[str, str], checkpoint: str, student: Mapping[str, Any] | None
) -> list[str]:
    """Returns overrides that set what a student fixes.

    Args:
        cfg: the config.
        values: the user's overrides, values by key.
        checkpoint: name of the checkpoint, for a message.
        student: entry of its network config; None: it is a teacher.

    Raises:
        ValueError: the user gave one of these settings another value.
    """
    fixed, sampler = fixed_settings(student), OmegaConf.to_container(cfg.sampler, resolve=True)
    for key, value in values.items():
        name = re.sub(r"sampler[./](\w+).*", r"\1", key)
        same = value == fixed.get(name) if key == "sampler/solver" else sampler.get(name) == fixed.get(name)
        if name != key and name in fixed and not same:
            raise ValueError(refusal(f"{key}={value}", name, checkpoint, student))
    if student is None:
        return []
    keys = {name: "sampler/solver" if name == "solver" else f"sampler.{name}" for name in fixed}
    return [f"{key}={text_of(fixed[name])}" for name, key in keys.items() if key not in values]


def text_of(value: Any) -> str:
    """Returns a value as Hydra reads it in an override."""
    return value if isinstance(value, str) and value else json.dumps(value)


def read_checkpoint_header(checkpoint: str) -> tuple[dict, str]:
    """Returns the network config of a checkpoint, `{}` of a released one, and the name of its base; errors are those of
    `follow_checkpoint`."""
    place = locate(checkpoint)
    if isinstance(place, HubAddress):
        if place.repo == RELEASE_REPO:
            return {}, RELEASED_BASE  # known before the download
        from dit4sr_pl.model.checkpoint_files import fetch

        place = fetch(place)
    if place.is_dir():
        return {}, RELEASED_BASE
    if place.suffix == ".ckpt":
        from dit4sr_pl.model import load_part

        part = load_part(place)
        return part.network_config, part.base["name"]
    network_config, base = network_and_base(place)
    return network_config, base["name"]


def backbone_option(name: str) -> str | None:
    """Returns the option in `conf/backbone/` of a model's name; None: there is none."""
    for file in sorted(Path(conf_folder(), "backbone").glob("*.yaml")):
        if OmegaConf.select(OmegaConf.load(file), "model.backbone.name") == name:
            return file.stem
    return None
