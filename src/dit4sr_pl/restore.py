"""python -m dit4sr_pl.restore input=FILE_OR_FOLDER output=FOLDER [checkpoint=PATH] [scale=4]"""

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

if TYPE_CHECKING:
    from dit4sr_pl.restoration.worklist import Worklist

ALPHA = ("bicubic", "network")
LONG_TEXT = 80  # characters; a longer text, such as a prompt, is recorded by its hash


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

    options = {key: cfg[key] for key in ("prompt", "overwrite", "keep_suffix", "first_frame", "samples")}
    options["dropped_words"] = cfg.captions.dropped_words
    worklist = make_worklist(Path(cfg.input), Path(cfg.output), shard=read_shard(cfg.shard), **options)
    check_same_settings(Path(cfg.output), worklist.results, settings_of(cfg))
    total, done = worklist.total, worklist.done
    if worklist.entries:
        cfg.device = choose_device(cfg.device, cfg.model.backbone)
        check_cuda_graph(cfg.cuda_graph, cfg.device)
        if cfg.get("captioner") is not None:
            caption(worklist, cfg)
    if worklist.entries:
        restore(worklist, cfg)
    if done == total:
        print(f"nothing to do: {done} of {done} images are in {cfg.output} already; overwrite=true restores them again")
    else:
        print(
            f"{len(worklist.entries)} of {total} images restored into {cfg.output}"
            + f"; {done} were there" * (done > 0)
        )
    report(worklist.failures, total)


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """Returns the settings that every result depends on; long texts by their hash."""
    from dit4sr_pl.common.hashing import values_hash
    from dit4sr_pl.common.run_identity import flatten, without_modules
    from dit4sr_pl.restoration.made_with import identity_of_checkpoint

    keys = ("scale", "seed", "alpha", "injection_scale", "first_frame", "prompt", "sampler")
    every = OmegaConf.to_container(cfg, resolve=True)
    backbone = {key: every["model"]["backbone"][key] for key in ("name", "dtype", "quantization")}
    chosen = {key: every[key] for key in keys} | {"backbone": backbone}
    settings = without_modules(dict(flatten(chosen))) | {"checkpoint": identity_of_checkpoint(cfg.checkpoint)}
    del settings["sampler.tile_memory"]  # it changes no result
    short = {key: values_hash({key: text}) for key, text in settings.items() if len(str(text)) > LONG_TEXT}
    return settings | short


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
        picture_restorer = PictureRestorer(restorer, cfg.scale, cfg.alpha, cfg.seed, cfg.png_level)
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
                    recorder.add(entry.target)
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
    check_scale(cfg.scale)
    if not isinstance(cfg.seed, int):
        raise ValueError(f"seed={cfg.seed}: must be a whole number")
    check_batch_size(cfg.batch_size)
    check_png_level(cfg.png_level)
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


if __name__ == "__main__":
    main()
