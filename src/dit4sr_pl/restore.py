"""python -m dit4sr_pl.restore input=FILE_OR_FOLDER output=FOLDER [checkpoint=PATH] [scale=4]"""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from dit4sr_pl.cli.checkpoint import follow_checkpoint
from dit4sr_pl.cli.checks import (
    check_backbone,
    check_batch_size,
    check_captioner,
    check_compiler,
    check_cuda_graph,
    check_png_level,
    check_readable,
    check_scale,
    check_writable,
    choose_device,
    read_shard,
)
from dit4sr_pl.cli.command import command
from dit4sr_pl.common.files import folder_lock, has_contents
from dit4sr_pl.common.progress import track, work
from dit4sr_pl.restoration.sizes import TARGETS, TargetSize

if TYPE_CHECKING:
    from dit4sr_pl.restoration.worklist import Worklist

SCALE = 4  # without one, and without a size of the results
ALPHA = ("bicubic", "network")
FORMATS = ("png", "jpeg", "webp", "tiff", "avif", "same")
LOSSLESS = ("png", "tiff")


@command("restore")
def main(cfg: DictConfig) -> None:
    """Restores pictures and reports how many."""
    cfg = follow_checkpoint(cfg)
    check(cfg)
    with folder_lock(Path(cfg.output), read_shard(cfg.shard)):
        restore_folder(cfg)


def restore_folder(cfg: DictConfig) -> None:
    """Restores this shard's pictures into a locked folder and reports how many."""
    from dit4sr_pl.restoration.made_with import check_same_settings
    from dit4sr_pl.restoration.worklist import make_worklist

    options = {key: cfg[key] for key in ("prompt", "overwrite", "keep_suffix", "first_frame", "samples", "format")}
    options |= {"dropped_words": cfg.captions.dropped_words, "scale": scale_of(cfg)}
    worklist = make_worklist(Path(cfg.input), Path(cfg.output), shard=read_shard(cfg.shard), **options)
    captioned = cfg.get("captioner") is not None  # pictures without a caption get one
    captions = {path: text or (None if captioned else "") for path, text in worklist.results.items()}
    check_same_settings(Path(cfg.output), captions, settings_of(cfg))
    total, done = worklist.total, worklist.done
    if worklist.entries:
        cfg.device = choose_device(cfg.device, cfg.model.backbone)
        check_cuda_graph(cfg.cuda_graph, cfg.device)
        if cfg.get("captioner") is not None:
            caption(worklist, cfg)
    if worklist.entries:
        restore(worklist, cfg)
    others = f"; no images: {summary(worklist.others)}" if worklist.others else ""
    if done == total:
        state = f"nothing to do: {done} of {done} images are in {cfg.output} already"
        print(f"{state}; overwrite=true restores them again{others}")
    else:
        state = f"{len(worklist.entries)} of {total} images restored into {cfg.output}"
        print(state + f"; {done} were there" * (done > 0) + others)
    report(worklist.failures, total)


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """Returns the settings that every result depends on."""
    from dit4sr_pl.common.run_identity import flatten, without_modules
    from dit4sr_pl.restoration.made_with import identity_of_checkpoint

    keys = ("seed", "alpha", "injection_scale", "first_frame", "prompt", "sampler", "colorize")
    every = OmegaConf.to_container(cfg, resolve=True)
    backbone = {key: every["model"]["backbone"][key] for key in ("name", "dtype", "quantization")}
    scale = scale_of(cfg)
    size = {scale.kind: scale.value} if isinstance(scale, TargetSize) else {"scale": scale}
    chosen = {key: every[key] for key in keys} | size | {"backbone": backbone}
    if cfg.format not in LOSSLESS:
        chosen["quality"] = cfg.quality
    settings = without_modules(dict(flatten(chosen))) | {"checkpoint": identity_of_checkpoint(cfg.checkpoint)}
    del settings["sampler.tile_memory"]  # it changes no result
    return settings


def restore(worklist: "Worklist", cfg: DictConfig) -> None:
    """Restores the worklist's entries; keeps the restored ones in it and moves the others to its failures."""
    import torch
    from hydra.utils import instantiate

    from dit4sr_pl.restoration.pictures import PictureRestorer
    from dit4sr_pl.restoration.reading import reading
    from dit4sr_pl.restoration.restorer import Restorer
    from dit4sr_pl.restoration.worklist import batches

    in_batches = list(batches(worklist.entries, cfg.batch_size))
    with reading(in_batches, cfg.first_frame) as read:  # its process starts before there is a network
        device, backbone = torch.device(cfg.device), instantiate(cfg.model.backbone)
        options = cfg.offload, cfg.injection_scale, cfg.compile, cfg.cuda_graph
        restorer = Restorer.load(backbone, instantiate(cfg.sampler), cfg.checkpoint, device, *options)
        picture_restorer = PictureRestorer(
            restorer, scale_of(cfg), cfg.alpha, cfg.seed, cfg.png_level, cfg.quality, cfg.colorize
        )
        restore_entries(worklist, cfg, partial(picture_restorer.run, read), restorer.evaluations)


def restore_entries(worklist: "Worklist", cfg: DictConfig, run: Callable, evaluations: int) -> None:
    """Shows how far `run(on_step)` has come, which yields an outcome for each of the worklist's entries.

    Raises:
        KeyboardInterrupt: the user stopped it; the message says how many are restored.
        OSError: nothing more can be written; so does this one.
    """
    from dit4sr_pl.restoration.made_with import Recorder

    waiting, worklist.entries = worklist.entries, []
    pixels = {
        entry: entry.size[0] * entry.size[1] * (2 if entry.alpha and cfg.alpha == "network" else 1) for entry in waiting
    }
    recorder = Recorder(settings_of(cfg))
    with work("restoring", sum(pixels.values()), len(waiting)) as show:  # in LR pixels that pass the network
        moved = finished = 0

        def step(evaluated: int) -> None:
            nonlocal moved
            moved += evaluated / evaluations
            show(moved, items=len(worklist.entries))

        try:
            for entry, failure, notes in run(step):
                finished += pixels[entry]
                moved = max(moved, finished)  # a result is written while the next one moves the bar
                show(moved, items=len(worklist.entries) + 1)
                if failure is None:
                    worklist.entries.append(entry)
                    recorder.add(entry.target, entry.prompt)
                else:
                    worklist.failures.append(failure)
                for note in notes:
                    print(f"note: {entry.source}: {note}")
        except (KeyboardInterrupt, OSError) as error:
            state = (
                f"{len(worklist.entries)} of {len(waiting)} images restored into {cfg.output}; the same command resumes"
            )
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"interrupted: {state}") from None
            raise OSError(f"{error}: {state}") from None


def caption(worklist: "Worklist", cfg: DictConfig) -> None:
    """Gives every picture without a prompt a caption, written next to its first result, where the same command finds
    it again.

    Pictures that cannot be read join the failures. The captioning model is freed afterwards.
    """
    from hydra.utils import instantiate

    from dit4sr_pl.images.captions import CaptionFiles, drop_sentences
    from dit4sr_pl.preparation.captioner import write_captions

    texts = {entry: entry.caption_file for entry in worklist.entries if not entry.prompt}
    missing = {text: entry.source for entry, text in texts.items() if not has_contents(text)}
    if missing:
        bar = partial(track, description="captions")
        worklist.failures += write_captions(
            [(source, text) for text, source in missing.items()], instantiate(cfg.captioner), 1, bar
        )
    described = {
        entry: drop_sentences(CaptionFiles(text.parent)[text.stem], cfg.captions.dropped_words)
        for entry, text in texts.items()
        if has_contents(text)
    }
    worklist.entries = [
        replace(entry, prompt=described.get(entry, entry.prompt))
        for entry in worklist.entries
        if entry.prompt or entry in described
    ]


def scale_of(cfg: DictConfig) -> float | TargetSize:
    """Returns the factor of the sides, or the size of the results if the config has one."""
    for kind in TARGETS:
        if cfg[kind] is not None:
            return TargetSize(kind, cfg[kind])
    return SCALE if cfg.scale is None else cfg.scale


def summary(files: list[Path]) -> str:
    """Returns the number of files and the first of their names."""
    names = ", ".join(file.name for file in files[:3])
    return f"{len(files)} files ({names}{', ...' * (len(files) > 3)})" if len(files) > 1 else f"1 file ({names})"


def report(failures: list[str], total: int) -> None:
    """Raises ValueError if there are failures: a single one is the error, several are printed first, a line each."""
    lines = [f"not restored: {' '.join(failure.split())}" for failure in sorted(failures)]
    if len(lines) == 1:
        raise ValueError(lines[0])
    if lines:
        print(*lines, sep="\n", file=sys.stderr)
        raise ValueError(f"{len(lines)} of {total} images not restored, for the reasons above")


def check(cfg: DictConfig) -> None:
    """Checks everything that a user can get wrong and that shows without PyTorch."""
    if OmegaConf.is_missing(cfg, "input"):
        raise ValueError("no value for input; give an image or a folder of images as input=PATH")
    check_readable(cfg.input, "input")
    read_shard(cfg.shard)
    check_size(cfg)
    check_format(cfg)
    if not isinstance(cfg.seed, int):
        raise ValueError(f"seed={cfg.seed}: must be a whole number")
    check_batch_size(cfg.batch_size)
    if not isinstance(cfg.samples, int) or not 1 <= cfg.samples <= 100:
        raise ValueError(f"samples={cfg.samples}: must be a whole number from 1 to 100")
    if cfg.alpha not in ALPHA:
        raise ValueError(f"alpha={cfg.alpha}: choose one of {', '.join(ALPHA)}")
    if Path(cfg.output).resolve() == Path(cfg.input).resolve():
        raise ValueError(f"output={cfg.output}: is the input folder; choose another, which may lie in it")
    check_backbone(cfg.model.backbone)
    check_compiler(cfg.compile, "compile")
    if cfg.get("captioner") is not None:
        check_captioner(cfg.captioner)
    check_writable(cfg.output, "output")


def check_size(cfg: DictConfig) -> None:
    """Raises ValueError unless at most one of scale, size, short_side and megapixels is given, and in its range."""
    given = [key for key in ("scale", *TARGETS) if cfg[key] is not None]
    if len(given) > 1:
        texts = " and ".join(f"{key}={cfg[key]}" for key in given)
        raise ValueError(f"{texts}: each sets the size of the results; give one of them")
    for key in given:
        if key == "scale":
            check_scale(cfg.scale)
        elif key == "megapixels":
            if isinstance(cfg[key], bool) or not isinstance(cfg[key], int | float) or not 0 < cfg[key] < math.inf:
                raise ValueError(f"megapixels={cfg[key]}: must be a number above 0, in millions of pixels")
        elif isinstance(cfg[key], bool) or not isinstance(cfg[key], int) or cfg[key] < 1:
            raise ValueError(f"{key}={cfg[key]}: must be a whole number of pixels, 1 or more")


def check_format(cfg: DictConfig) -> None:
    """Raises ValueError unless the format of the results is known and its options belong to it."""
    if cfg.format not in FORMATS:
        raise ValueError(f"format={cfg.format}: choose one of {', '.join(FORMATS)}")
    check_png_level(cfg.png_level)
    if cfg.quality is not None:
        if isinstance(cfg.quality, bool) or cfg.quality not in range(1, 101):
            raise ValueError(f"quality={cfg.quality}: must be a whole number from 1 to 100, or null")
        if cfg.format in LOSSLESS:
            raise ValueError(f"quality={cfg.quality}: {cfg.format} is lossless; give format=jpeg, webp, avif or same")
    if cfg.png_level is not None and cfg.format not in ("png", "same"):
        raise ValueError(f"png_level={cfg.png_level}: belongs to format=png, not to format={cfg.format}")


if __name__ == "__main__":
    main()
