"""python -m dit4sr_pl.evaluate images=FOLDER [reference=FOLDER] metrics=[psnr,ssim] output=FOLDER
python -m dit4sr_pl.evaluate dataset=NAME [method=NAME] [checkpoint=PATH] output=FOLDER [shard=i/n]"""

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError

from dit4sr_pl.cli.checkpoint import follow_checkpoint
from dit4sr_pl.cli.checks import (
    check_backbone,
    check_batch_size,
    check_compiler,
    check_cuda_graph,
    check_extra,
    check_png_level,
    check_readable,
    check_writable,
    choose_device,
    read_shard,
)
from dit4sr_pl.cli.command import command
from dit4sr_pl.common.progress import track
from dit4sr_pl.scores.weight_files import check_metrics, is_of_set


@command("evaluate")
def main(cfg: DictConfig) -> None:
    """Runs one evaluation."""
    evaluate(cfg)


def evaluate(cfg: DictConfig) -> None:
    """Restores and scores the rest of this shard, and writes the result when no shard has any left."""
    if cfg.images is None and "backbone" in cfg.method:
        cfg = follow_checkpoint(cfg)
    check(cfg)
    dataset, items = open_items(cfg)
    chosen = metrics_for(cfg, items)  # so far without PyTorch
    networks = cfg.images is None and "backbone" in cfg.method
    cfg.device = choose_device(cfg.device, cfg.model.backbone if "backbone" in cfg.method else None)
    check_cuda_graph(networks and cfg.cuda_graph, cfg.device)

    from hydra.utils import instantiate

    from dit4sr_pl.evaluation.methods import Finished
    from dit4sr_pl.evaluation.scoring import claim, join, restore, score, tune_malloc, working
    from dit4sr_pl.evaluation.set_scoring import image_metrics, set_scores

    output, (number, count) = Path(cfg.output), read_shard(cfg.shard)
    metrics = {name: instantiate(metric) for name, metric in chosen.items()}
    method = instantiate(cfg.method) if cfg.images is None else Finished(named(Path(cfg.images)))
    identity = identity_of(cfg, dataset, items, metrics, method)
    identity = claim(output, identity, restores=cfg.images is None)
    mine = items[number - 1 :: count]
    with working(output, (number, count)) as piece:
        if cfg.images is None:
            bar = functools.partial(track, description=f"restoring, {method.label}")
            restore(mine, method, bar, cfg.batch_size, cfg.png_level)
        tune_malloc()
        for metric in metrics.values():
            metric.to(cfg.device)
        # On a CPU SSIM takes a GiB per image, and nothing becomes faster by batches.
        at_once = 1 if cfg.device == "cpu" else cfg.batch_size
        of_images = {name: metrics[name] for name in image_metrics(chosen)}
        score(mine, of_images, output, piece, functools.partial(track, description="scoring"), at_once)
        of_sets = functools.partial(set_scores, items, metrics, identity["metrics"], output)
        write = functools.partial(finish, cfg, dataset, method, identity, of_sets)
        missing = join(items, image_metrics(identity["metrics"]), output, piece, write)
    if missing:
        print(f"{len(items) - len(missing)} of {len(items)} images scored; the last shard to end writes the result")


def named(images: Path) -> str:
    """Returns the folder's name; for a result's `images/`, the result's."""
    images = images.resolve()
    return images.parent.name if images.name == "images" else images.name


def open_items(cfg: DictConfig) -> tuple[str, list]:
    """Returns the set's name in `conf/dataset/` and its images."""
    from hydra.utils import instantiate

    from dit4sr_pl.evaluation.benchmark_sets import finished_images

    if "dataset" not in cfg:
        return "folder", finished_images(Path(cfg.images), cfg.reference and Path(cfg.reference))
    dataset = instantiate(cfg.dataset, dropped_words=list(cfg.captions.dropped_words))
    if dataset.count not in (None, len(dataset.lr)):
        print(f"{len(dataset.lr)} of {dataset.name}'s {dataset.count} images are there")
    restored = Path(cfg.output) / "images"
    return dataset.name, dataset.items(restored) if cfg.images is None else dataset.finished(Path(cfg.images))


def metrics_for(cfg: DictConfig, items: list) -> dict[str, DictConfig]:
    """Returns the metrics' configs; without ground truth, metrics that need it are left out, which is printed.

    Raises:
        FileNotFoundError: weights are missing.
        ValueError: the user asked for such a metric, none is left, or one needs larger images.
    """
    has_reference = lambda metric: items[0].hr is not None or metric.get("folder") is not None  # noqa: E731
    needing = [name for name, metric in cfg.metrics.items() if metric.reference and not has_reference(metric)]
    if needing:
        overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
        asked = any(re.match(r"[+~]*metrics\b", override) for override in overrides)
        if asked or len(needing) == len(cfg.metrics):
            raise ValueError(
                f"no ground truth, needed for {', '.join(needing)}; give reference=FOLDER or metrics=no_reference"
            )
        print(f"no ground truth: without {', '.join(needing)}")
    chosen = {name: metric for name, metric in cfg.metrics.items() if name not in needing}
    for name, metric in chosen.items():
        if metric.get("folder") is not None:
            check_readable(metric.folder, f"metrics.{name}.folder")
        if is_of_set(metric) and len(items) < 2:
            raise ValueError(f"metrics={name}: a score of a set, and there is one image; give more images")
    check_metrics(chosen, min(item.side for item in items))
    return chosen


def identity_of(cfg: DictConfig, dataset: str, items: list, metrics: dict, method: Any) -> dict:
    """Returns the evaluation's identity, as it is kept in `settings.json`."""
    from dit4sr_pl.common.hashing import file_hash, values_hash
    from dit4sr_pl.common.run_identity import evaluation_identity
    from dit4sr_pl.evaluation.set_scoring import folder_hash
    from dit4sr_pl.scores.results import versions

    files = {}
    for item in items:
        paths = item.lr, item.hr, item.sr if cfg.images is not None else None
        files[item.name] = [item.caption, item.crop, *(path and file_hash(path) for path in paths)]
    scored_by = {}
    for name, metric in metrics.items():
        options = {key: value for key, value in cfg.metrics[name].items() if key != "weights"}
        scored_by[name] = options | {"measured": metric.score is not None}
        if options.get("folder") is not None:
            scored_by[name]["folder"] = folder_hash(Path(options["folder"]))
    produced_by = {"label": method.label} | method.identity
    return evaluation_identity(dataset, values_hash(files), scored_by, produced_by, cfg.name, versions())


def finish(cfg: DictConfig, dataset: str, method: Any, identity: dict, of_sets: Callable, scores: dict) -> None:
    """Writes the result, with the scores of the set that `of_sets` returns, and prints its means."""
    from dit4sr_pl.common.hashing import values_hash
    from dit4sr_pl.common.run_identity import hashed_part
    from dit4sr_pl.scores.results import Result, run_name, write_result

    output = Path(cfg.output)
    result = Result(
        run=run_name(output),
        method=cfg.name or method.label,
        variant=method.variant,
        dataset=dataset,
        seed=cfg.seed,
        pictures="images" if cfg.images is None else os.path.relpath(cfg.images, output),
        identity_hash=values_hash(hashed_part(identity)),
        weights_hash=method.weights_hash,
        network=method.network_config,
        versions=identity["versions"],
        scores=scores,
        set_scores=of_sets(),
    )
    write_result(result, output)
    means = ", ".join(f"{metric} {value:.4f}" for metric, value in result.means.items())
    print(f"{result.method} on {dataset}, mean of {len(scores)} images: {means}; each in {output / 'scores.csv'}")


def check(cfg: DictConfig) -> None:
    """Checks everything that a user can get wrong and that shows without PyTorch."""
    read_shard(cfg.shard)
    check_batch_size(cfg.batch_size)
    check_png_level(cfg.png_level)
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
    """Checks the options of a dataset."""
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
            folder = Path(cfg.dataset.folder) / cfg.dataset[key]
            check_readable(folder, f"dataset.{key}")
            if cfg.images is None and Path(cfg.output).resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"output={cfg.output}: lies in dataset.{key}, among its images; choose another folder")
    if cfg.dataset.captions is not None:
        check_readable(cfg.dataset.captions, "dataset.captions")


def check_method(cfg: DictConfig) -> None:
    """Checks the options of a method."""
    if missing := OmegaConf.missing_keys(cfg.method):
        raise ValueError(f"no value for {', '.join(sorted(missing))}; see docs/systems.md")
    if "weights" in cfg.method and cfg.method.weights is None:
        raise ValueError("no value for weights; give a published file as weights=FILE (docs/systems.md)")
    if ".spandrel." in cfg.method._target_:
        check_extra("this method", "spandrel", "spandrel")
    if "backbone" in cfg.method:
        check_backbone(cfg.model.backbone)
        check_compiler(cfg.compile, "compile")


if __name__ == "__main__":
    main()
