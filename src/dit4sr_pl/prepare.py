"""python -m dit4sr_pl.prepare stage=crops|captions|embeddings|latents|manifest data.folders=[PATH,...]

python -m dit4sr_pl.prepare stage=metrics metrics=paper
"""

import functools
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dit4sr_pl.cli.benchmarks import name_benchmark
from dit4sr_pl.cli.checks import (
    check_backbone,
    check_captioner,
    check_data,
    check_writable,
    read_shard,
)
from dit4sr_pl.cli.command import command
from dit4sr_pl.common.files import folder_lock
from dit4sr_pl.common.progress import track, work
from dit4sr_pl.common.run_identity import flatten, without_modules
from dit4sr_pl.scores.weight_files import Weights, download


@command("prepare")
def main(cfg: DictConfig) -> None:
    """Runs one stage of the preparation."""
    check(cfg)
    STAGES[cfg.stage](cfg, read_shard(cfg.shard))


def captions(cfg: DictConfig, shard: tuple[int, int]) -> None:
    """Captions the photos of this shard that have no caption yet."""
    from hydra.utils import instantiate

    from dit4sr_pl.data.photo_sets import open_sets
    from dit4sr_pl.preparation.captioner import one_per_caption, write_captions

    photos = [
        photo for photo_set in open_sets(cfg.data.folders, cfg.data.sets, cfg.data.pairs) for photo in photo_set.photos
    ]
    files = one_per_caption((photo.path, photo.captions.folder / f"{photo.name}.txt") for photo in photos)
    number, count = shard
    files = files[number - 1 :: count]
    bar = functools.partial(track, description="captions")
    with ExitStack() as locks:
        for folder in sorted({photo.captions.folder for photo in photos}):
            locks.enter_context(folder_lock(folder, shard))
        failed = write_captions(files, instantiate(cfg.captioner), cfg.batch_size, bar)
    print(f"{len(files) - len(failed)} of {len(files)} images have captions")
    if failed:
        raise ValueError("not captioned: " + "; ".join(failed))


def crops(cfg: DictConfig, shard: tuple[int, int]) -> None:
    """Cuts the crops of this shard's photos that do not exist yet; the last task writes their manifest."""
    from dit4sr_pl.data.photo_sets import open_sets
    from dit4sr_pl.preparation.build_manifest import build_manifest
    from dit4sr_pl.preparation.crops import is_pending, sources, write_crops

    folder, (number, count) = Path(cfg.crops), shard
    photos = sources(open_sets(cfg.data.folders, cfg.data.sets), folder, cfg.crops_per_photo)
    ours = photos[number - 1 :: count]
    bar = functools.partial(track, description="crops")
    with folder_lock(folder, shard):
        cut = write_crops(ours, cfg.data.crop_size, cfg.seed, bar)
    there = sum(path.exists() for source in ours for path in source.crops)
    print(f"{there} crops of {len(ours)} photos in {folder}")
    for reason, left in sorted(cut.left_out.items()):
        print(f"{left} photos left out: {reason}")
    if there and not any(map(is_pending, photos)):
        with work(f"manifest of {folder}") as show:
            built = build_manifest(folder, processes=cfg.processes, on_file=show)
        print(f"{built.manifest}: the manifest of all crops")
    if cut.failed:
        raise ValueError("not cut: " + "; ".join(cut.failed))


def latents(cfg: DictConfig, shard: tuple[int, int]) -> None:
    """Encodes the crops of this shard that have no latents yet, with the autoencoder in float32."""
    import torch
    from hydra.utils import instantiate

    from dit4sr_pl.data.photo_sets import open_sets
    from dit4sr_pl.preparation.latents import claim, write_latents

    number, count = shard
    photos = [photo for photo_set in open_sets(cfg.data.folders, cfg.data.sets) for photo in photo_set.photos]
    ours, device = photos[number - 1 :: count], torch.device(cfg.device)
    backbone = instantiate(cfg.model.backbone, dtype="float32")
    backbone.to(device)
    bar = functools.partial(track, description="latents")
    options = cfg.data.crop_size, cfg.seed, device, bar
    settings = dict(flatten({"degradation": OmegaConf.to_container(cfg.degradation, resolve=True)}))
    settings = without_modules(settings) | {"seed": cfg.seed, "crop_size": cfg.data.crop_size}
    with folder_lock(Path(cfg.latents), shard):
        claim(Path(cfg.latents), settings | {"vae": backbone.parts["vae"]} if "vae" in backbone.parts else settings)
        failed = write_latents(ours, Path(cfg.latents), backbone.coder, instantiate(cfg.degradation), *options)
    print(f"latents of {len(ours) - len(failed)} crops in {cfg.latents}")
    if failed:
        raise ValueError("not encoded: " + "; ".join(failed))


def embeddings(cfg: DictConfig, shard: tuple[int, int]) -> None:
    """Encodes the prompts of this shard that the cache lacks."""
    import torch
    from hydra.utils import instantiate

    from dit4sr_pl.backbone.sd3 import text_parts
    from dit4sr_pl.preparation.embeddings import write_embeddings

    backbone, device = instantiate(cfg.model.backbone), torch.device(cfg.device)
    backbone.to(device)
    added = write_embeddings(
        all_prompts(cfg),
        lambda prompt: backbone.prompts.encode(prompt, device),
        cfg.embeddings,
        backbone.name,
        backbone.t5_tokens,
        round(cfg.file_megabytes * 1e6),
        shard,
        functools.partial(track, description="embeddings"),
        text_parts(backbone.parts),
    )
    print(f"{added} prompts added to {cfg.embeddings}")


def all_prompts(cfg: DictConfig) -> Iterator[str]:
    """Yields the prompts that training and its validation need: captions, and captions in the sampler's wording."""
    from hydra.utils import instantiate

    from dit4sr_pl.data.latents import LatentPairs
    from dit4sr_pl.data.photo_sets import open_sets

    captions, trained = [""], []
    if cfg.data.latents is not None:
        trained += sorted(LatentPairs(cfg.data.latents, cfg.data.captions, cfg.data.crop_size, 0, 0).prompts())
    for photo_set in open_sets(cfg.data.folders, cfg.data.sets, cfg.data.pairs) if cfg.data.latents is None else []:
        trained += [photo.prompt for photo in photo_set.photos]
    yield from trained
    if cfg.for_students:
        captions += trained
    for photo_set in open_sets(cfg.data.validation_folders) if cfg.data.validation_folders else []:
        captions += [photo.prompt for photo in photo_set.photos]
    if cfg.data.validation is not None:
        captions += [item.caption for item in instantiate(cfg.data.validation).items(Path())]
    yield from sorted(instantiate(cfg.sampler).prompts(captions))
    yield from cfg.prompts


def manifest(cfg: DictConfig, shard: tuple[int, int]) -> None:
    """Writes the manifest of every folder of photos."""
    from dit4sr_pl.preparation.build_manifest import build_manifest

    damaged = []
    for folder, path in manifests(cfg):
        with folder_lock(Path(folder) if path is None else Path(path).parent), work(f"manifest of {folder}") as show:
            built = build_manifest(folder, path, cfg.processes, show)
        print(f"{folder}: {built.files} photos, {len(built.damaged)} of them damaged; {built.manifest}")
        damaged += [f"{Path(folder) / file} ({reason})" for file, reason in built.damaged]
    if damaged:
        raise ValueError("damaged, and left out of training until they are repaired: " + "; ".join(damaged))


def manifests(cfg: DictConfig) -> list[tuple[str, str | None]]:
    """Returns folders with the path of their manifest; None: the usual place in the folder."""
    named = [(options.folder, options.get("manifest")) for options in named_sets(cfg).values()]
    return [(folder, None) for folder in cfg.data.folders] + named


def metrics(cfg: DictConfig, shard: tuple[int, int]) -> None:
    """Downloads the weight files of the chosen metrics; existing files are checked and kept if they are complete."""
    failed = []
    for weights in weights_of(cfg):
        for file in weights.files:
            path = weights.path(file["url"])
            try:
                downloaded = download(file["url"], path, file["sha256"])
                print(f"{path}: {'downloaded' if downloaded else 'was there'}")
            except (OSError, ValueError) as error:
                failed.append(f"{path.name} from {file['url']} ({error})")
    if failed:
        raise ValueError(f"not downloaded; copy them into {Path(cfg.metric_weights.folder)}: " + "; ".join(failed))


def weights_of(cfg: DictConfig) -> list[Weights]:
    """Returns the weights that the chosen metrics need."""
    return [Weights(**metric.weights) for metric in cfg.metrics.values() if "weights" in metric]


STAGES = {
    "captions": captions,
    "embeddings": embeddings,
    "manifest": manifest,
    "metrics": metrics,
    "crops": crops,
    "latents": latents,
}


def named_sets(cfg: DictConfig) -> dict[str, DictConfig]:
    """Returns the named sets of photos that have a folder."""
    return {name: options for name, options in cfg.data.sets.items() if options.folder is not None}


def check(cfg: DictConfig) -> None:
    """Checks everything that a user can get wrong and that shows without PyTorch."""
    if OmegaConf.is_missing(cfg, "stage") or cfg.stage not in STAGES:
        given = "no value for stage" if OmegaConf.is_missing(cfg, "stage") else f"stage={cfg.stage}"
        raise ValueError(f"{given}; choose one of {', '.join(STAGES)}")
    read_shard(cfg.shard)
    if cfg.stage == "metrics":
        check_writable(Path(cfg.metric_weights.folder).expanduser(), "metric_weights.folder")
    else:
        name_benchmark(cfg)
        check_data(cfg.data, written=cfg.stage)
        CHECKS[cfg.stage](cfg)


def check_crops(cfg: DictConfig) -> None:
    """Checks the options of `stage=crops`."""
    if cfg.crops_per_photo < 1:
        raise ValueError(f"crops_per_photo={cfg.crops_per_photo}: must be 1 or more")
    check_sides(cfg)
    inside = Path(cfg.crops).resolve()
    for folder in [*cfg.data.folders, *(options.folder for options in named_sets(cfg).values())]:
        if inside.is_relative_to(Path(folder).resolve()):
            raise ValueError(f"crops={cfg.crops}: lies in {folder}, and would be cut itself next time; choose another")
    check_writable(cfg.crops, "crops")


def check_latents(cfg: DictConfig) -> None:
    """Checks the options of `stage=latents`."""
    check_sides(cfg)
    check_backbone(cfg.model.backbone)
    check_writable(cfg.latents, "latents")


def check_sides(cfg: DictConfig) -> None:
    """Raises ValueError unless crops can be cut at `data.crop_size`."""
    if cfg.data.crop_size < 16 or cfg.data.crop_size % 16:
        raise ValueError(f"data.crop_size={cfg.data.crop_size}: must be a positive multiple of 16 pixels (one token)")


def check_captions(cfg: DictConfig) -> None:
    """Checks the options of `stage=captions`."""
    if cfg.batch_size < 1:
        raise ValueError(f"batch_size={cfg.batch_size}: must be 1 or more")
    check_captioner(cfg.captioner)
    for folder in cfg.data.folders:
        check_writable(folder, "data.folders")
    named = {f"sets.{name}": (options.folder, options) for name, options in named_sets(cfg).items()}
    named |= {f"pairs.{name}": (options.hr, options) for name, options in cfg.data.pairs.items() if options.hr}
    for name, (folder, options) in named.items():
        captions = options.get("captions") or folder
        if Path(captions).suffix in (".parquet", ".jsonl"):
            raise ValueError(f"data.{name}.captions={captions}: captions are written as files; give a folder")
        check_writable(captions, f"data.{name}.captions")


def check_embeddings(cfg: DictConfig) -> None:
    """Checks the options of `stage=embeddings`."""
    if cfg.model.backbone.embeddings is not None:
        raise ValueError("model.backbone.embeddings is where training reads; give embeddings=FOLDER to write them")
    check_backbone(cfg.model.backbone)
    check_writable(cfg.embeddings, "embeddings")


def check_manifest(cfg: DictConfig) -> None:
    """Checks the options of `stage=manifest`."""
    if cfg.shard != "1/1":
        raise ValueError(f"shard={cfg.shard}: stage=manifest runs as one task; give processes=N")
    if cfg.processes < 1:
        raise ValueError(f"processes={cfg.processes}: must be 1 or more")
    for folder, path in manifests(cfg):
        check_writable(folder if path is None else Path(path).parent, "the manifest's folder")


CHECKS = {
    "crops": check_crops,
    "captions": check_captions,
    "embeddings": check_embeddings,
    "latents": check_latents,
    "manifest": check_manifest,
}


if __name__ == "__main__":
    main()
