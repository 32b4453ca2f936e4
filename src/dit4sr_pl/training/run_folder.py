"""The folder of a training run: one run at a time, always of the same settings, and where it goes on.

    config.yaml               the resolved config of the last start
    code.yaml, code.diff      the commit that it ran, what differed from it, versions of packages
    train.log                 of all starts, one after another
    checkpoints/              NNNNNNN.ckpt by step; last.ckpt leads to the newest; .aside ones are never read again
    finished.yaml             written when all else is there

No PyTorch in here: a run that is finished or refused says so in a moment.
"""

import logging
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dit4sr_pl.common.files import atomic_write, exclusive_lock
from dit4sr_pl.common.run_identity import differences, resume_identity
from dit4sr_pl.training.provenance import record_code

log = logging.getLogger(__name__)

CONFIG, LOG, LOCK, CHECKPOINTS, FINISHED = "config.yaml", "train.log", ".lock", "checkpoints", "finished.yaml"
WRITTEN = (CONFIG, FINISHED, "code.*", LOG, "*.safetensors", "events.out.tfevents.*", "losses.csv", "scores.csv")
WRITTEN += ("results.*", "images", CHECKPOINTS)


@contextmanager
def open_run(cfg: DictConfig) -> Iterator[Path]:
    """The run's folder, held by this run alone, with its config and code recorded and its log attached.

    Raises:
        ValueError: another process writes there, or it holds a run of other settings.
    """
    folder = Path(cfg.output)
    leader = leads(cfg.trainer)
    with exclusive_lock(folder / LOCK) if leader else nullcontext():
        if leader and cfg.overwrite:
            clear(folder)
        check_same_run(cfg, folder)
        with logged(folder / LOG) if leader else nullcontext():
            yield folder


def leads(trainer: DictConfig) -> bool:
    """Whether this process writes the run's files: of a run on several devices, that of rank 0.

    A run on one device has no other processes, whatever the environment says: two of them are two runs.
    """
    ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))
    return (trainer.devices == 1 and trainer.num_nodes == 1) or all(rank == "0" for rank in ranks)


def clear(folder: Path) -> None:
    """Removes what runs have left in a folder, the record that there was one last."""
    for path in [path for pattern in reversed(WRITTEN) for path in folder.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_same_run(cfg: DictConfig, folder: Path) -> None:
    """Raises ValueError if the folder holds a run that this config would not continue, and names what differs."""
    if not (folder / CONFIG).is_file() or not (checkpoints_in(folder) or (folder / FINISHED).is_file()):
        return
    ours, theirs = resume_identity(cfg), resume_identity(OmegaConf.load(folder / CONFIG))
    if differing := differences(ours, theirs):
        named = ", ".join(f"{key}={ours.get(key)} (there {theirs.get(key)})" for key in differing[:3])
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"{folder} holds a run of other settings: {named}{more}; give another folder (hydra.run.dir=FOLDER), "
            "or overwrite=true to remove that run"
        )


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Appends to a file what this project, Lightning and Python's warnings say; ours is also shown."""
    file, shown = logging.FileHandler(path), logging.StreamHandler()
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    shown.addFilter(lambda record: record.exc_info is None)  # the command answers in one line
    places = [("dit4sr_pl", file), ("dit4sr_pl", shown), ("py.warnings", file), ("py.warnings", shown)]
    places += [("lightning.pytorch", file)]
    for name, handler in places:
        logging.getLogger(name).addHandler(handler)
    logging.getLogger("dit4sr_pl").setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    except Exception:
        log.exception("stopped by an error")
        raise
    finally:
        logging.captureWarnings(False)
        for name, handler in places:
            logging.getLogger(name).removeHandler(handler)
        file.close()


def begin(cfg: DictConfig, folder: Path, start: int) -> None:
    """Writes down what is about to run from step `start`, sets aside the checkpoints after it, and removes what killed
    processes left half-written. From here on the run is not finished."""
    (folder / FINISHED).unlink(missing_ok=True)
    with atomic_write(folder / CONFIG) as partial:
        OmegaConf.save(cfg, partial, resolve=True)
    record_code(folder)
    for path in checkpoints_in(folder):
        if int(path.stem) > start:
            path.replace(path.with_suffix(".ckpt.aside"))
    for partial in (folder / CHECKPOINTS).glob(".*.partial"):
        partial.unlink()


def finish(folder: Path, steps: int) -> None:
    with atomic_write(folder / FINISHED) as partial:
        OmegaConf.save({"steps": steps}, partial)


def finished_steps(folder: Path) -> int:
    """Of a run that went through to its end; else 0."""
    path = folder / FINISHED
    return OmegaConf.load(path).steps if path.is_file() else 0


def checkpoints_in(folder: Path) -> list[Path]:
    """By step, the newest first."""
    return sorted((folder / CHECKPOINTS).glob("[0-9]*.ckpt"), key=lambda path: int(path.stem), reverse=True)


def newest_checkpoint(folder: Path, max_steps: int) -> Path | None:
    """To go on from. One of the last step has nothing left to train: the run repeats that step, and its end."""
    for path in checkpoints_in(folder):
        if int(path.stem) < max_steps:
            if is_whole(path):
                return path
            log.warning("%s: damaged; passed over for the one before", path)
    return None


def is_whole(path: Path) -> bool:
    """Whether a checkpoint has all its bytes, by the checksums in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False
