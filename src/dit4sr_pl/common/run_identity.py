"""Identities of training runs and evaluations: the settings that tell whether two of them are the same.

    resume_identity(cfg)      settings that a resumed training must share with the run that it continues
    result_identity(cfg)      settings that a training's scores depend on, except the seed
    evaluation_identity(...)  everything that an evaluation's scores depend on; `settings.json` in its folder

An identity is a dict of plain values. Two runs are the same if their identities are equal. This module is in `common`
because training and evaluation, which do not import each other, both use it.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dit4sr_pl.common.devices import device_count
from dit4sr_pl.common.secrets import without_secrets

# Settings that never change a result: they concern paths, display, saving and speed.
NO_EFFECT = (
    "output",
    "ckpt_path",
    "overwrite",
    "root",
    "global_batch",
    "logger",
    "metric_weights",
    "ablation_name",
    "sharded",
)
NO_EFFECT += ("data.num_workers", "data.photos_in_memory", "data.latents_in_memory", "data.batch_size", "model.compile")
NO_EFFECT += ("model.network.gradient_checkpointing", "model._target_")  # `_target_` says whether training is sharded
NO_EFFECT += ("trainer.devices", "trainer.num_nodes", "trainer.accumulate_grad_batches", "trainer.strategy")
NO_EFFECT += ("trainer.accelerator", "trainer.plugins", "trainer.enable_progress_bar", "trainer.log_every_n_steps")
NO_EFFECT += ("trainer.enable_model_summary", "trainer.profiler")
NO_EFFECT += tuple(
    f"callbacks.{name}" for name in ("checkpoint", "scores", "degradation", "hyper_parameters", "progress", "losses")
)
NO_EFFECT += ("callbacks.monitor",)  # a user's own callback that only watches
NO_EFFECT += ("model.backbone.gpu_memory", "student.perceptual.weights.folder", "model.perceptual.weights.folder")
# Copies of settings that have a key of their own.
NO_EFFECT += ("model.optimizer", "model.schedule", "model.seed", "model.sampler", "data.seed", "data.degradation")

# Classes of callbacks that only watch, or end a run as `trainer.max_steps` does, whatever their key is.
WATCHING = ("LearningRateMonitor", "DeviceStatsMonitor", "ThroughputMonitor", "RichProgressBar", "TQDMProgressBar")
WATCHING += ("ModelSummary", "RichModelSummary", "ModelCheckpoint", "OnExceptionCheckpoint", "EarlyStopping", "Timer")

# Settings that may change when a run is resumed, although its scores depend on them; docs/resume.md says why.
MAY_CHANGE = ("sampler", "metrics", "trainer.max_steps", "trainer.max_time", "trainer.max_epochs")
MAY_CHANGE += ("trainer.val_check_interval", "trainer.limit_val_batches", "trainer.check_val_every_n_epoch")
MAY_CHANGE += ("trainer.num_sanity_val_steps",)
MAY_CHANGE += ("data.validation", "data.validation_folders", "data.validation_crop", "data.validation_limit")

# Exceptions to the two lists above: settings that belong to both identities.
MUST_MATCH = ("callbacks.ema", "trainer.precision", "trainer.gradient_clip_val")

# Keys that were added since 0.1, with the values that do what was done without them. Left out of identities, so that
# runs from before stay what they are.
ADDED = {
    "callbacks.ema.update_every_n_steps": 1,
    "callbacks.ema.update_starting_at_step": None,
    "data.pairs": {},
    "data.validation": None,
    "data.latents": None,
    "data.captions": None,
    "data.latent_crops": None,
    "model.backbone.quantization": None,
    "model.conv_learning_rate": 1.0,
    "sampler.guidance": "classifier_free",
    "sampler.guidance_sigma_min": 0.0,
    "sampler.guidance_sigma_max": 1.0,
    "sampler.lr_refresh": 1,
    "sampler.lr_shared": False,
    "sampler.tiling": "overlapping",
    "sampler.sigmas": None,
    "sampler.wavelet_levels": 5,
    "trainer.max_time": None,
    "schedule._target_": "LearningRateSchedule",
    "schedule.name": "constant",
    "schedule.num_warmup_steps": 0,
    "schedule.num_cycles": 1,
    "schedule.power": 1.0,
    "schedule.step_rules": None,
    "schedule.decay": 0.0,
    "model.timesteps._target_": "TimestepDensity",
    "model.timesteps.name": "logit_normal",
    "model.timesteps.mean": 0.0,
    "model.timesteps.std": 1.0,
    "model.timesteps.scale": 1.29,
}


def resume_identity(cfg: DictConfig) -> dict[str, Any]:
    """Returns the settings that must not change within a training run, by dotted key."""
    return bound_settings(cfg, (*NO_EFFECT, *MAY_CHANGE))


def result_identity(cfg: DictConfig) -> dict[str, Any]:
    """Returns the settings that a training's scores depend on, by dotted key, without the seed.

    Runs that repeat one another with other seeds have one result identity.
    """
    return bound_settings(cfg, (*NO_EFFECT, "seed"))


def bound_settings(cfg: DictConfig, free: tuple[str, ...]) -> dict[str, Any]:
    """Returns the settings outside of the `free` sections, without added ones that do as before; see `ADDED`."""
    settings = without_added(flat_settings(cfg))
    free += tuple(key.removesuffix("._target_") for key, value in settings.items() if watches(key, value))
    return {key: value for key, value in settings.items() if within(key, MUST_MATCH) or not within(key, free)}


def watches(key: str, value: object) -> bool:
    """Returns whether a setting is the class of a callback that does not change the training."""
    return bool(re.fullmatch(r"callbacks\.[^.]+\._target_", key)) and value in WATCHING


def without_added(settings: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Returns the settings of a section, such as `sampler.`, without added ones that do as before; see `ADDED`."""
    return {key: value for key, value in settings.items() if ADDED.get(section + key, Ellipsis) != value}


def evaluation_identity(
    dataset: str,
    files: str,
    metrics: Mapping[str, Mapping[str, Any]],
    method: Mapping[str, Any],
    name: str | None,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Returns everything that the scores of an evaluation depend on.

    Args:
        dataset: the set's name in `conf/dataset/`.
        files: hash of the set's images and captions.
        metrics: options of every metric by its name, with `measured`, which is False where its weights are missing.
        method: the method's label and what its restored images depend on.
        name: the row's name in tables; None: the method's label.
        versions: versions of the packages that scores depend on.
    """
    return {
        "dataset": dataset,
        "files": files,
        "metrics": {metric: without_modules(options) for metric, options in metrics.items()},
        "method": without_secrets(dict(method)),
        "name": name,
        "versions": dict(versions),
    }


def upgraded(before: Mapping[str, Any], today: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an evaluation's identity, which an earlier version may have written, with today's keys.

    Args:
        before: the identity that a folder holds.
        today: the identity of today's command. The network of 0.1, which did not record it, was the one that the
            checkpoint's file describes: the same file describes it today. Its samplers had two options less.
    """
    metrics = {metric: without_modules(options) for metric, options in before["metrics"].items()}
    method = dict(before["method"])
    if "checkpoint" in method:
        method["weights_hash"] = method.pop("checkpoint")
    if "network" in today["method"]:
        method.setdefault("network", today["method"]["network"])
        method["sampler"] = {"fit": "floor", "process_size": None} | method.get("sampler", {})
    return {**before, "metrics": metrics, "method": method}


def complete_parts(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Gives both of two evaluations' identities the fingerprints of the backbone's parts that only one of them has.

    Parts that were not recorded, or are not downloaded yet, are not compared.
    """
    bases = [identity["method"].get("base") for identity in (ours, theirs)]
    if all(isinstance(base, dict) for base in bases):
        parts = [dict(base.get("parts", {})) for base in bases]
        for base, own, other in zip(bases, parts, reversed(parts), strict=True):
            base["parts"] = other | own


def hashed_part(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the hash of an evaluation's identity covers: all but versions, the row's name, and fingerprints of
    the backbone's parts, which evaluations of before 0.2 do not have."""
    hashed = {key: value for key, value in identity.items() if key not in ("versions", "name")}
    method = hashed.get("method", {})
    if isinstance(base := method.get("base"), dict):
        base = {key: value for key, value in base.items() if key != "parts"}
        hashed["method"] = dict(method) | {"base": base}
    return hashed


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Returns the keys, sorted, in which two identities differ."""
    return sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))


def flat_settings(cfg: DictConfig) -> dict[str, Any]:
    """Returns a config's settings by dotted key, as they are read back from `config.yaml`.

    Adds `images per step`, the product of batch size, devices, nodes and accumulated batches.
    """
    written = OmegaConf.create(OmegaConf.to_yaml(cfg, resolve=True))
    settings = without_modules(dict(flatten(without_secrets(OmegaConf.to_container(written)))))
    settings["images per step"] = images_per_step(written)
    return settings


def images_per_step(cfg: DictConfig) -> int:
    """Returns the images of a step on all devices."""
    trainer = cfg.trainer
    devices = device_count(trainer.devices, trainer.accelerator)
    return math.prod([cfg.data.batch_size, devices, trainer.num_nodes, trainer.accumulate_grad_batches])


def without_modules(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings with every `_target_` cut to its class's name, since a class may move to another module."""
    return {
        key: value.rpartition(".")[2] if key.split(".")[-1] == "_target_" and isinstance(value, str) else value
        for key, value in settings.items()
    }


def within(key: str, sections: tuple[str, ...]) -> bool:
    """Returns whether a dotted key is one of the sections or lies in one."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested dicts with their dotted keys; an empty dict is a leaf."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
