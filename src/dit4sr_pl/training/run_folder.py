"""The folder of a training run. One process at a time writes to it, and all its starts share their settings.

    config.yaml               the resolved config of the last start
    code.yaml, code.diff      its commit, the uncommitted changes, the versions of packages
    train.log                 the log of all starts
    checkpoints/              NNNNNNN.ckpt by step; last.ckpt links to the newest; files named .aside are not read
    finished.yaml             written last

This module does not import PyTorch, so a finished or refused run ends within a second.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dit4sr_pl.common.files import atomic_write, folder_lock
from dit4sr_pl.common.run_identity import differences, resume_identity
from dit4sr_pl.training.provenance import record_code

log = logging.getLogger(__name__)

CONFIG, LOG, CHECKPOINTS, FINISHED = "config.yaml", "train.log", "checkpoints", "finished.yaml"
WRITTEN = (CONFIG, FINISHED, "code.*", LOG, "*.safetensors", "events.out.tfevents.*", "losses.csv", "scores.csv")
WRITTEN += ("results.*", "images", CHECKPOINTS)


@contextmanager
def open_run(cfg: DictConfig) -> Iterator[Path]:
    """Locks the run's folder, appends the log to its `train.log`, and yields the folder.

    Raises:
        ValueError: another process writes there, or the folder holds a run with other settings.
    """
    folder = Path(cfg.output)
    leader = leads(cfg.trainer)
    with folder_lock(folder) if leader else nullcontext():
        if leader and cfg.overwrite:
            clear(folder)
        check_same_run(cfg, folder)
        with logged(folder / LOG) if leader else nullcontext():
            yield folder


def leads(trainer: DictConfig) -> bool:
    """Returns whether this process writes the run's files: on several devices only rank 0 does.

    A run on one device has one process, whatever rank the environment names: a second process is a second run.
    """
    ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))
    return (trainer.devices == 1 and trainer.num_nodes == 1) or all(rank == "0" for rank in ranks)


def clear(folder: Path) -> None:
    """Removes a run's files from a folder, its config last."""
    for path in [path for pattern in reversed(WRITTEN) for path in folder.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_same_run(cfg: DictConfig, folder: Path) -> None:
    """Raises ValueError, with the settings that differ, if the folder holds a run with other settings."""
    if not (folder / CONFIG).is_file() or not (checkpoints_in(folder) or (folder / FINISHED).is_file()):
        return
    ours, theirs = resume_identity(cfg), resume_identity(OmegaConf.load(folder / CONFIG))
    if differing := differences(ours, theirs):
        named = ", ".join(f"{key}={ours.get(key)} (the run has {theirs.get(key)})" for key in differing[:3])
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"{folder} holds a run with other settings: {named}{more}; give another folder (output=FOLDER), "
            "or overwrite=true to remove that run"
        )


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Appends the logs of this project and of Lightning and Python's warnings to a file; shows all but Lightning's."""
    file, shown = logging.FileHandler(path), logging.StreamHandler()
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    shown.addFilter(lambda record: record.exc_info is None)  # the command shows errors in one line
    places = [("dit4sr_pl", file), ("dit4sr_pl", shown), ("py.warnings", file), ("py.warnings", shown)]
    places += [("lightning.pytorch", file)]
    for name, handler in places:
        logging.getLogger(name).addHandler(handler)
    logging.getLogger("dit4sr_pl").setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    except Exception:
        log.exception("the run stopped with an error")
        raise
    finally:
        logging.captureWarnings(False)
        for name, handler in places:
            logging.getLogger(name).removeHandler(handler)
        file.close()


def begin(cfg: DictConfig, folder: Path, start: int) -> None:
    """Prepares the folder for a training from step `start`; the run counts as unfinished from now on.

    Records config and code, renames the checkpoints after `start` to `.aside`, and removes half-written ones.
    """
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
    """Marks the run as finished after `steps` steps."""
    with atomic_write(folder / FINISHED) as partial:
        OmegaConf.save({"steps": steps}, partial)


def finished_steps(folder: Path) -> int:
    """Returns the steps of a finished run; 0: the run is not finished."""
    path = folder / FINISHED
    return OmegaConf.load(path).steps if path.is_file() else 0


def checkpoints_in(folder: Path) -> list[Path]:
    """Returns the checkpoints of a run, the newest first."""
    return sorted((folder / CHECKPOINTS).glob("[0-9]*.ckpt"), key=lambda path: int(path.stem), reverse=True)


def newest_checkpoint(folder: Path, max_steps: int) -> Path | None:
    """Returns the newest undamaged checkpoint before step `max_steps`; None: the run starts from the beginning.

    A checkpoint of the last step leaves nothing to train, so a run without results repeats that step.

    Raises:
        OSError: a checkpoint cannot be read, which does not mean that it is damaged.
        ValueError: all of them are damaged.
    """
    from dit4sr_pl.model.training_state import is_whole

    paths = [path for path in checkpoints_in(folder) if int(path.stem) < max_steps]
    for path in paths:
        if is_whole(path):
            return path
        log.warning("%s: damaged; the run resumes from an earlier checkpoint", path)
    if paths:
        raise ValueError(
            f"{folder / CHECKPOINTS}: all checkpoints are damaged, such as {paths[0].name}; give ckpt_path=FILE to "
            "resume from another one, or overwrite=true to start again"
        )
    return None
