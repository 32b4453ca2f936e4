"""What identifies a training run: the settings that a resumed run must share with the one that it continues."""

import math
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

# What a run may be continued with another value of; docs/resume.md says why. Everything else makes another run.
MAY_CHANGE = ("output", "ckpt_path", "overwrite", "logger", "callbacks", "metrics", "metric_weights")
MAY_CHANGE += ("sampler", "model.sampler", "trainer", "ablation_name")
MAY_CHANGE += ("data.num_workers", "data.photos_in_memory", "data.validation_folders", "data.validation_crop")
MAY_CHANGE += ("data.validation_limit", "data.batch_size", "model.compile", "model.network.gradient_checkpointing")
MAY_CHANGE += ("model._target_",)  # sharded or not
MAY_CHANGE += ("model.optimizer", "model.seed", "data.seed", "data.degradation")  # copies of what has a key of its own
MUST_MATCH = ("callbacks.ema", "trainer.precision", "trainer.gradient_clip_val")  # within what is free


def settings(cfg: DictConfig) -> dict[str, Any]:
    """What must not change within a run, by dotted key."""
    written = OmegaConf.create(OmegaConf.to_yaml(cfg, resolve=True))  # as read back from the file
    flat = dict(flatten(OmegaConf.to_container(written)))
    trainer = written.trainer
    counts = [written.data.batch_size, trainer.devices, trainer.num_nodes, trainer.accumulate_grad_batches]
    known = all(isinstance(count, int) for count in counts)
    flat["images per step"] = math.prod(counts) if known else " x ".join(map(str, counts))
    return {key: value for key, value in flat.items() if within(key, MUST_MATCH) or not within(key, MAY_CHANGE)}


def within(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
