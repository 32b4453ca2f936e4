"""python -m dit4sr_pl.evaluate images=FOLDER [reference=FOLDER] metrics=[psnr,ssim] output=FOLDER
python -m dit4sr_pl.evaluate dataset=NAME [method=NAME] [checkpoint=PATH] output=FOLDER [shard=i/n]"""

import functools
import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError

from dit4sr_pl.config import check_backbone, check_readable, check_writable, command, read_shard


@command("evaluate")
def main(cfg: DictConfig) -> None:
    evaluate(cfg)


def evaluate(cfg: DictConfig) -> None:
    """Restores and scores what is left of this shard, and writes the result when nothing is left of any."""
    check(cfg)
    dataset, items = open_items(cfg)  # what does not fit together is told before PyTorch is there

    from hydra.utils import instantiate
    from rich.progress import track

    from dit4sr_pl.methods import Finished
    from dit4sr_pl.scoring import claim, join, restore, score

    output, (number, count) = Path(cfg.output), read_shard(cfg.shard)
    metrics = open_metrics(cfg, has_reference=items[0].hr is not None)
    method = instantiate(cfg.method) if cfg.images is None else Finished(Path(cfg.images).resolve().name)
    settings = settings_of(cfg, dataset, items, metrics, method)
    claim(output, settings)
    mine = items[number - 1 :: count]
    if cfg.images is None:
        restore(mine, method, functools.partial(track, description=f"restoring, {method.label}"))
    score(mine, metrics, output, (number, count), functools.partial(track, description="scoring"))
    missing = join(items, output, functools.partial(finish, cfg, dataset, method, settings))
    if missing:
        print(f"{len(items) - len(missing)} of {len(items)} images scored; the last shard to end writes the result")


def open_items(cfg: DictConfig) -> tuple[str, list]:
    """The set's name in `conf/dataset/`, and its images."""
    from hydra.utils import instantiate

    from dit4sr_pl.benchmark_sets import finished_images

    if "dataset" not in cfg:
        return "folder", finished_images(Path(cfg.images), cfg.reference and Path(cfg.reference))
    dataset = instantiate(cfg.dataset)
    if dataset.count not in (None, len(dataset.lr)):
        print(f"{len(dataset.lr)} of {dataset.name}'s {dataset.count} images are there")
    restored = Path(cfg.output) / "images"
    return dataset.name, dataset.items(restored) if cfg.images is None else dataset.finished(Path(cfg.images))


def open_metrics(cfg: DictConfig, has_reference: bool) -> dict[str, Any]:
    """Metrics on their device. Without ground truth those that need it are left out, with a line that says so.

    Raises:
        ValueError: the user asked for one of them, or none is left.
    """
    import torch
    from hydra.utils import instantiate

    metrics = instantiate(cfg.metrics)
    blind = {name: metric for name, metric in metrics.items() if not metric.needs_reference}
    if not has_reference and len(blind) < len(metrics):
        needing = ", ".join(name for name in metrics if name not in blind)
        asked = HydraConfig.initialized() and any("metrics" in text for text in HydraConfig.get().overrides.task)
        if asked or not blind:
            raise ValueError(f"no ground truth, needed for {needing}; give reference=FOLDER, or other metrics")
        print(f"no ground truth: without {needing}")
        metrics = blind
    return {name: metric.to(torch.device(cfg.device)) for name, metric in metrics.items()}


def settings_of(cfg: DictConfig, dataset: str, items: list, metrics: dict, method: Any) -> dict:
    """All that scores depend on: `settings.json`."""
    from dit4sr_pl.results import file_hash, hash_of, package_versions

    files = {
        item.name: [item.caption, item.crop] + [path and file_hash(path) for path in (item.lr, item.hr)]
        for item in items
    }
    if cfg.images is not None:
        files = {item.name: [*files[item.name], file_hash(item.sr)] for item in items}
    scored_by = {name: OmegaConf.to_container(cfg.metrics[name], resolve=True) for name in metrics}
    return {
        "dataset": dataset,
        "files": hash_of(files),
        "metrics": scored_by,
        "method": {"label": method.label} | method.settings,
        "name": cfg.name,
        "versions": package_versions(),
    }


def finish(cfg: DictConfig, dataset: str, method: Any, settings: dict, scores: dict) -> None:
    from dit4sr_pl.results import Result, hash_of, write_result

    output = Path(cfg.output)
    result = Result(
        run=output.resolve().name,
        method=cfg.name or method.label,
        variant=method.variant,
        dataset=dataset,
        seed=cfg.seed,
        pictures="images" if cfg.images is None else os.path.relpath(cfg.images, output),
        config=hash_of({key: value for key, value in settings.items() if key not in ("versions", "name")}),
        checkpoint=method.checkpoint,
        versions=settings["versions"],
        scores=scores,
    )
    write_result(result, output)
    means = ", ".join(f"{metric} {value:.4f}" for metric, value in result.means.items())
    print(f"{result.method} on {dataset}, mean of {len(scores)} images: {means}; each in {output / 'scores.csv'}")


def check(cfg: DictConfig) -> None:
    """Everything that a user can get wrong and that needs no PyTorch to be seen."""
    read_shard(cfg.shard)
    for key in ("images", "reference"):
        if cfg[key] is not None:
            check_readable(cfg[key], key)
    if "dataset" in cfg:
        check_dataset(cfg)
    elif cfg.images is None:
        raise ValueError("nothing to score; give images=FOLDER, or dataset=NAME to restore and score")
    if cfg.images is None:
        check_method(cfg)
    check_writable(cfg.output, "output")


def check_dataset(cfg: DictConfig) -> None:
    if cfg.reference is not None:
        raise ValueError("reference is for images=FOLDER without a dataset; give dataset.hr=FOLDER instead")
    if OmegaConf.is_missing(cfg.dataset, "lr"):
        raise ValueError("no value for dataset.lr; give a folder of LR images as dataset.lr=FOLDER")
    try:
        check_readable(cfg.dataset.folder, "dataset.folder")
    except InterpolationToMissingValueError:
        name = cfg.dataset.name
        raise ValueError(f"where is {name}? give dataset.folder=PATH, or root=PATH of all benchmarks") from None
    for key in ("lr", "hr"):
        if cfg.dataset[key] is not None:
            check_readable(Path(cfg.dataset.folder) / cfg.dataset[key], f"dataset.{key}")
    if cfg.dataset.captions is not None:
        check_readable(cfg.dataset.captions, "dataset.captions")


def check_method(cfg: DictConfig) -> None:
    if missing := OmegaConf.missing_keys(cfg.method):
        raise ValueError(f"no value for {', '.join(f'method.{key}' for key in sorted(missing))}; see docs/systems.md")
    if "weights" in cfg.method and cfg.method.weights is None:
        raise ValueError("no value for weights; give a published file as weights=FILE (docs/systems.md)")
    if "backbone" in cfg.method:
        check_backbone(cfg.model.backbone)


if __name__ == "__main__":
    main()
