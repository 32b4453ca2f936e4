"""The folder of a training run. One process at a time writes to it, and all its starts share their settings.

    config.yaml               the resolved config of the last start, without secrets
    code.yaml, code.diff      the commit, the uncommitted changes, the versions of packages when training began
    code-NNNNNNN.yaml, .diff  the same, when it resumed from step NNNNNNN
    train.log                 the log of all starts
    checkpoints/              NNNNNNN.ckpt by step; last.ckpt links to the newest; files named .aside are not read
    finished.yaml             written last

This module does not import PyTorch, so a finished or refused run ends within a second.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dit4sr_pl.common.files import atomic_write, folder_lock
from dit4sr_pl.common.run_identity import differences, resume_identity
from dit4sr_pl.common.secrets import hidden, without_secrets
from dit4sr_pl.training import former_run
from dit4sr_pl.training.former_run import CHECKPOINTS, check_not_read, files_of_run, holds_run, is_set_aside
from dit4sr_pl.training.provenance import record_code, recorded_job, scheduler_job

log = logging.getLogger(__name__)

CONFIG, LOG, FINISHED = "config.yaml", "train.log", "finished.yaml"
EVENTS = "events.out.tfevents.*"
RECORD = re.compile(r"code-(\d{7,})\.(?:yaml|diff)")


@contextmanager
def open_run(cfg: DictConfig) -> Iterator[Path]:
    """Locks the run's folder, appends the log to its `train.log`, and yields the folder; the first process calls it.

    Raises:
        ValueError: another process writes there; the folder holds a run with other settings; or `overwrite=true` would
            replace what the command reads.
    """
    folder = Path(cfg.output)
    with folder_lock(folder), logged(folder / LOG):
        settle(folder)
        if cfg.overwrite:
            check_not_read(files_of_run(folder), cfg)
        else:
            check_same_run(cfg, folder)
        yield folder


def settle(folder: Path) -> None:
    """Decides about a run that `overwrite=true` has set aside: it goes if the new run has a checkpoint, else it is put
    back.
    """
    if is_set_aside(folder) and (checkpoints_in(folder) or (folder / FINISHED).is_file()):
        former_run.remove(folder)
    elif former_run.put_back(folder):
        log.warning("%s: the new run stopped before its first checkpoint; the former run is back", folder)


def check_same_run(cfg: DictConfig, folder: Path) -> None:
    """Raises ValueError, with the settings that differ, if the folder holds a run with other settings."""
    if (folder / CONFIG).is_file() and not holds_run(folder):
        raise ValueError(f"{folder / CONFIG}: not a run's; give another folder (output=FOLDER)")
    if not (folder / CONFIG).is_file() or not (checkpoints_in(folder) or (folder / FINISHED).is_file()):
        return
    theirs = resume_identity(read_config(folder / CONFIG))
    ours = resume_identity(cfg)
    if differing := differences(ours, theirs):
        named = ", ".join(f"{key}={ours.get(key)} (the run has {theirs.get(key)})" for key in differing[:3])
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"{folder} holds a run with other settings: {named}{more}; give another folder (output=FOLDER), "
            "or overwrite=true to replace that run"
        )


def read_config(path: Path) -> DictConfig:
    """Reads a run's config; raises ValueError, with what to do, if it is empty or damaged."""
    with suppress(OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, ValueError):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and {"trainer", "data", "model"} <= config.keys():
            return OmegaConf.load(path)
    raise ValueError(
        f"{path}: empty or damaged, so nothing tells whether its checkpoints are of this run; bring it back, give "
        "another folder (output=FOLDER), or overwrite=true to replace that run"
    )


class Formatter(logging.Formatter):
    """Python's formatter, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns a record as text."""
        return hidden(super().format(record))


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Appends the logs of this project and of Lightning and Python's warnings to a file; shows all but Lightning's."""
    file, shown = logging.FileHandler(path), logging.StreamHandler()
    file.setFormatter(Formatter("%(asctime)s %(levelname)s %(message)s"))
    shown.setFormatter(Formatter())
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


class Start:
    """The changes that a start of a run makes to its folder, none of which happens before its first step is trained.

    Args:
        cfg: the run's config; with `overwrite`, the run that the folder holds is set aside.
        folder: the run's folder, locked.
        step: the step that training resumes from.
    """

    def __init__(self, cfg: DictConfig, folder: Path, step: int):
        self.cfg, self.folder, self.step, self.begun = cfg, folder, step, False
        self.former = files_of_run(folder) if cfg.overwrite else []
        self.events = set(folder.glob(EVENTS))

    def begin(self) -> None:
        """Records config and code; the run counts as unfinished from now on.

        Checkpoints and records of code after the step that training resumes from are renamed to `.aside`.
        """
        self.begun, folder = True, self.folder
        former_run.set_aside(self.former)
        (folder / FINISHED).unlink(missing_ok=True)
        with atomic_write(folder / CONFIG) as partial:
            OmegaConf.save(without_secrets(OmegaConf.to_container(self.cfg, resolve=True)), partial)
        record_code(folder, self.step)
        later = [path for path in checkpoints_in(folder) if int(path.stem) > self.step]
        records = [
            path
            for path in folder.glob("code-*")
            if (match := RECORD.fullmatch(path.name)) and int(match[1]) > self.step
        ]
        for path in later + records:
            path.replace(path.with_name(f"{path.name}.aside"))

    def undo(self) -> None:
        """Leaves the folder as it was after an error or a signal, unless the new run has a checkpoint."""
        if not self.begun:
            for events in set(self.folder.glob(EVENTS)) - self.events:
                events.unlink()  # TensorBoard would hide the steps that were to be repeated
        settle(self.folder)


def is_restart(folder: Path) -> bool:
    """Returns whether a scheduler has started this command again after it has trained in this folder."""
    if int(os.environ.get("SLURM_RESTART_COUNT") or 0) == 0 or not (folder / CONFIG).is_file():
        return False
    kept = bool(checkpoints_in(folder)) or not is_set_aside(folder)  # otherwise another run's files come back
    return kept and recorded_job(folder) == scheduler_job()


def finish(folder: Path, steps: int, max_steps: int, max_time: str | None = None) -> None:
    """Marks the run as finished after `steps` steps; fewer than `max_steps` if a callback or `max_time` ended it."""
    early = {"stopped_early": True, "max_time": max_time} if steps < max_steps else {}
    with atomic_write(folder / FINISHED) as partial:
        OmegaConf.save({"steps": steps} | early, partial)
    settle(folder)


def finished_steps(folder: Path, max_steps: int, max_time: str | None = None) -> int:
    """Returns the steps of a run that is finished for a command with these limits; 0: the run is not finished.

    A run that ended early is finished for a command with the same time limit only.
    """
    path = folder / FINISHED
    if not path.is_file():
        return 0
    with suppress(yaml.YAMLError, UnicodeDecodeError):
        finished = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(finished, dict) and isinstance(steps := finished.get("steps"), int) and steps >= 0:
            early = finished.get("stopped_early") and finished.get("max_time") == max_time
            return steps if steps >= max_steps or early else 0
    log.warning("%s: empty or damaged; the run counts as unfinished", path)
    return 0


def checkpoints_in(folder: Path) -> list[Path]:
    """Returns the checkpoints of a run, the newest first."""
    return by_step(folder / CHECKPOINTS)


def by_step(folder: Path) -> list[Path]:
    """Returns the checkpoints in a folder, the newest first; other files, such as somebody's copies, do not count."""
    names = [path for path in folder.glob("*.ckpt") if re.fullmatch(r"[0-9]+", path.stem)]
    return sorted(names, key=lambda path: int(path.stem), reverse=True)


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
    if aside := sorted((folder / CHECKPOINTS).glob("*.ckpt.aside")):
        log.warning(
            "%s: there is no checkpoint but %s, which was set aside; give ckpt_path=FILE to resume from such a file",
            folder,
            aside[-1].name,
        )
    return None
