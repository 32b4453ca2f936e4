"""python -m dit4sr_pl.prepare stage=captions|embeddings|manifest folders=[PATH,...] [shard=i/n]"""

import functools
import re
from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

from dit4sr_pl.config import check_backbone, check_readable, check_writable, command


@command("prepare")
def main(cfg: DictConfig) -> None:
    check(cfg)
    STAGES[cfg.stage](cfg, read_shard(cfg.shard))


def captions(cfg: DictConfig, shard: tuple[int, int]) -> None:
    from hydra.utils import instantiate
    from rich.progress import track

    from dit4sr_pl.captioner import caption_files, write_captions

    number, count = shard
    files = caption_files(cfg.folders, cfg.captions)[number - 1 :: count]
    captioner = instantiate(cfg.captioner)
    bar = functools.partial(track, description="captions")
    failed = write_captions(files, captioner, cfg.batch_size, cfg.dropped_words, bar)
    print(f"{len(files) - len(failed)} of {len(files)} images have captions")
    if failed:
        raise ValueError("not captioned: " + "; ".join(failed))


def embeddings(cfg: DictConfig, shard: tuple[int, int]) -> None:
    import torch
    from hydra.utils import instantiate
    from rich.progress import track

    from dit4sr_pl.embeddings import write_embeddings

    backbone, device = instantiate(cfg.model.backbone), torch.device(cfg.device)
    backbone.to(device)
    added = write_embeddings(
        all_prompts(cfg, instantiate(cfg.sampler)),
        lambda prompt: backbone.prompts.encode(prompt, device),
        cfg.embeddings,
        backbone.name,
        backbone.t5_tokens,
        round(cfg.file_megabytes * 1e6),
        shard,
        functools.partial(track, description="embeddings"),
    )
    print(f"{added} prompts added to {cfg.embeddings}")


def all_prompts(cfg: DictConfig, sampler) -> Iterator[str]:
    """Whatever training on `folders` and restoring `restored_folders` will ask for."""
    from dit4sr_pl.data import find_photos, read_prompt

    for photo in find_photos(cfg.folders) if cfg.folders else []:
        yield read_prompt(photo.path)
    for photo in find_photos(cfg.restored_folders) if cfg.restored_folders else []:
        yield sampler.prompt(read_prompt(photo.path))
    yield from [sampler.prompt(""), sampler.negative_prompt, *cfg.prompts]


def manifest(cfg: DictConfig, shard: tuple[int, int]) -> None:
    raise NotImplementedError


STAGES = {"captions": captions, "embeddings": embeddings, "manifest": manifest}


def read_shard(text: str) -> tuple[int, int]:
    """`i/n`, this task's number from 1 and how many there are.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", str(text))
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"shard={text}: must be i/n with i from 1 to n, such as 1/8 to 8/8 for eight tasks")
    return int(match[1]), int(match[2])


def check(cfg: DictConfig) -> None:
    """Everything that a user can get wrong and that needs no PyTorch to be seen."""
    if OmegaConf.is_missing(cfg, "stage") or cfg.stage not in STAGES:
        given = "no value for stage" if OmegaConf.is_missing(cfg, "stage") else f"stage={cfg.stage}"
        raise ValueError(f"{given}: give one of {', '.join(STAGES)}")
    read_shard(cfg.shard)
    for key in ("folders", "restored_folders"):
        for folder in cfg[key]:
            check_readable(folder, key)
    if cfg.stage != "embeddings" and not cfg.folders:
        raise ValueError("no value for folders; give folders of images as folders=[PATH,...]")
    if cfg.stage == "captions":
        if cfg.captioner.name.startswith((".", "/", "~")):
            check_readable(cfg.captioner.name, "captioner.name")
        if cfg.batch_size < 1:
            raise ValueError(f"batch_size={cfg.batch_size}: must be 1 or more")
        for folder in cfg.folders if cfg.captions is None else [cfg.captions]:
            check_writable(folder, "folders" if cfg.captions is None else "captions")
    if cfg.stage == "embeddings":
        check_backbone(cfg.model.backbone.name, None)
        if cfg.model.backbone.embeddings is not None:
            raise ValueError("model.backbone.embeddings is where training reads; give embeddings=FOLDER to write them")
        check_writable(cfg.embeddings, "embeddings")


if __name__ == "__main__":
    main()
