"""python -m dit4sr_pl.restore input=FILE_OR_FOLDER output=FOLDER [checkpoint=PATH] [scale=4]"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from dit4sr_pl.cli.checks import check_backbone, check_readable, check_scale, check_writable, choose_device
from dit4sr_pl.cli.command import command

if TYPE_CHECKING:
    from rich.progress import Progress

    from dit4sr_pl.restoration.worklist import Work

ALPHA = ("bicubic", "network")


@command("restore")
def main(cfg: DictConfig) -> None:
    check(cfg)

    from dit4sr_pl.restoration.worklist import list_work

    options = {key: cfg[key] for key in ("prompt", "overwrite", "keep_suffix", "first_frame")}
    work = list_work(Path(cfg.input), Path(cfg.output), **options)
    pictures, done = work.pictures, work.done
    if work.jobs:
        cfg.device = choose_device(cfg.device)
        if cfg.get("captioner") is not None:
            caption(work, cfg)
    if work.jobs:
        restore(work, cfg)
    if done == pictures:
        print(f"nothing to do: {done} of {done} images are in {cfg.output} already; overwrite=true restores them again")
    else:
        print(f"{len(work.jobs)} of {pictures} images restored into {cfg.output}" + f"; {done} were there" * (done > 0))
    report(work.failures, pictures)


def restore(work: "Work", cfg: DictConfig) -> None:
    """Leaves in `work.jobs` what is restored, and adds the rest to its failures."""
    import torch
    from hydra.utils import instantiate

    from dit4sr_pl.restoration.pictures import PictureRestorer
    from dit4sr_pl.restoration.restorer import Restorer
    from dit4sr_pl.restoration.worklist import batches

    device, backbone = torch.device(cfg.device), instantiate(cfg.model.backbone)
    restorer = Restorer.load(backbone, instantiate(cfg.sampler), cfg.checkpoint, device, cfg.offload)
    pictures = PictureRestorer(restorer, cfg.scale, cfg.alpha, cfg.seed, cfg.first_frame)
    waiting, work.jobs = work.jobs, []
    pixels = {job: job.size[0] * job.size[1] * (2 if job.alpha and cfg.alpha == "network" else 1) for job in waiting}
    evaluations = restorer.evaluations
    with progress_bar() as bar:
        task = bar.add_task("restoring", total=sum(pixels.values()), done=0, count=len(waiting))
        step = lambda evaluated: bar.advance(task, evaluated / evaluations)  # noqa: E731
        finished = 0
        try:
            for job, failure, notes in pictures.run(batches(waiting, cfg.batch_size), step):
                finished += pixels[job]
                bar.update(task, completed=finished, done=len(work.jobs) + 1)
                if failure is None:
                    work.jobs.append(job)
                else:
                    work.failures.append(failure)
                for note in notes:
                    bar.console.print(f"note: {job.source}: {note}", markup=False, highlight=False, soft_wrap=True)
        except (KeyboardInterrupt, OSError) as error:
            state = f"{len(work.jobs)} of {len(waiting)} images restored into {cfg.output}; the same command goes on"
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"interrupted: {state}") from None
            raise OSError(f"{error}: {state}") from None


def caption(work: "Work", cfg: DictConfig) -> None:
    """Gives the pictures without a prompt one, written beside the result, where the same command finds it again; what
    cannot be read joins the failures. The model is gone afterwards."""
    from hydra.utils import instantiate
    from rich.progress import track

    from dit4sr_pl.images.captions import CaptionFiles
    from dit4sr_pl.preparation.captioner import write_captions

    texts = {job: job.target.with_suffix(".txt") for job in work.jobs if not job.prompt}
    missing = [(job.source, text) for job, text in texts.items() if not text.exists()]
    if missing:
        bar = partial(track, description="captions")
        work.failures += write_captions(missing, instantiate(cfg.captioner), 1, bar)
    described = {job: CaptionFiles(text.parent)[text.stem] for job, text in texts.items() if text.exists()}
    work.jobs = [
        replace(job, prompt=described.get(job, job.prompt)) for job in work.jobs if job.prompt or job in described
    ]


def progress_bar() -> "Progress":
    """Moves with every step; the time left goes by the LR pixels that went through the network."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    count = TextColumn("{task.description} {task.fields[done]}/{task.fields[count]}")
    return Progress(count, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())


def report(failures: list[str], pictures: int) -> None:
    """Raises ValueError if there are failures: one in the error's line, more of them in a line each before it."""
    lines = [f"not restored: {' '.join(failure.split())}" for failure in sorted(failures)]
    if len(lines) == 1:
        raise ValueError(lines[0])
    if lines:
        print(*lines, sep="\n", file=sys.stderr)
        raise ValueError(f"{len(lines)} of {pictures} images not restored, for the reasons above")


def check(cfg: DictConfig) -> None:
    """Everything that a user can get wrong and that needs no PyTorch to be seen."""
    if OmegaConf.is_missing(cfg, "input"):
        raise ValueError("no value for input; give an image or a folder of images as input=PATH")
    check_readable(cfg.input, "input")
    check_scale(cfg.scale)
    if not isinstance(cfg.seed, int):
        raise ValueError(f"seed={cfg.seed}: must be a whole number")
    if not isinstance(cfg.batch_size, int) or cfg.batch_size < 1:
        raise ValueError(f"batch_size={cfg.batch_size}: must be 1 or more")
    if cfg.alpha not in ALPHA:
        raise ValueError(f"alpha={cfg.alpha}: choose one of {', '.join(ALPHA)}")
    if Path(cfg.output).resolve() == Path(cfg.input).resolve():
        raise ValueError(f"output={cfg.output}: is the input folder; choose another, which may be in it")
    check_backbone(cfg.model.backbone)
    check_writable(cfg.output, "output")


if __name__ == "__main__":
    main()
