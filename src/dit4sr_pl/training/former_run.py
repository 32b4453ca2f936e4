"""The run that `overwrite=true` replaces. Its files are set aside, and removed once the new run has a checkpoint.

A file is set aside into a hidden folder next to it, so that also linked folders keep their files on their own disk.
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from dit4sr_pl.common.hub import locate
from dit4sr_pl.common.names import check_name

FORMER = ".former_run"
CHECKPOINTS, PICTURES = "checkpoints", "images"
NAMES = ("config.yaml", "finished.yaml", "losses.csv", "scores.csv", "results.csv", "results.parquet", "hparams.yaml")
NAMES += ("lr_stream.safetensors", "controlnet.safetensors")
PATTERNS = re.compile(r"code(-\d{7,})?\.(yaml|diff)(\.aside)?|events\.out\.tfevents\..*")
CHECKPOINT_FILES = re.compile(r"\d{7,}\.ckpt(\.aside)?|last\.ckpt")
READ = ("ckpt_path", "model.checkpoint", "model.backbone", "data", "metric_weights")  # settings that may be paths


def files_of_run(folder: Path) -> list[Path]:
    """Returns the files that a run has written into a folder, but its log; [] for a folder without a run."""
    if not holds_run(folder):
        return []
    files = [path for path in folder.iterdir() if path.name in NAMES or PATTERNS.fullmatch(path.name)]
    if (folder / CHECKPOINTS).is_dir():
        files += [path for path in (folder / CHECKPOINTS).iterdir() if CHECKPOINT_FILES.fullmatch(path.name)]
    return files + [path for path in pictures(folder) if path.is_file()]


def holds_run(folder: Path) -> bool:
    """Returns whether the `config.yaml` in a folder is a run's; one that cannot be read is, next to a run's log."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if isinstance(config, dict):
        return {"output", "trainer", "data", "model"} <= config.keys()
    return (folder / "train.log").is_file()


def pictures(folder: Path) -> Iterator[Path]:
    """Yields the files of the restored images that a run's scores name."""
    from dit4sr_pl.scores.results import SCORES, read_scores

    try:
        for name in read_scores(folder / SCORES):
            yield folder / PICTURES / f"{check_name(name, folder / SCORES)}.png"
    except (OSError, ValueError):  # none, or cut off: the pictures stay, and the new run writes its own over them
        return


def check_not_read(files: Iterable[Path], cfg: DictConfig) -> None:
    """Raises ValueError if the command reads one of the files that it would replace, or a folder with one of them."""
    replaced = {os.path.realpath(file): file for file in files}
    for key in READ:
        for value in texts(OmegaConf.select(cfg, key)):
            place = locate(value) if key == "model.checkpoint" else Path(value).expanduser()
            if not isinstance(place, Path):
                continue  # on the hub
            read = os.path.realpath(place)
            if inside := [file for real, file in replaced.items() if Path(real).is_relative_to(read)]:
                raise ValueError(
                    f"overwrite=true would replace {inside[0]}, which {key} ({value}) reads; give another folder "
                    "(output=FOLDER), or copy what is read elsewhere"
                )


def texts(value: object) -> Iterator[str]:
    """Yields all texts in a setting."""
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from texts(each)


def set_aside(files: Iterable[Path]) -> None:
    """Moves files into hidden folders next to them, the config last: it tells that all others are there."""
    for file in sorted(files, key=lambda file: file.name == "config.yaml"):
        (file.parent / FORMER).mkdir(exist_ok=True)
        os.replace(file, file.parent / FORMER / file.name)


def is_set_aside(folder: Path) -> bool:
    """Returns whether a whole run is set aside."""
    return (folder / FORMER / "config.yaml").is_file()


def put_back(folder: Path) -> bool:
    """Undoes `set_aside`, over what a new run has written since; returns whether there was anything."""
    places = places_of(folder)
    if is_set_aside(folder):
        for events in folder.glob("events.out.tfevents.*"):
            events.unlink()  # of the new run
        os.replace(folder / FORMER / "config.yaml", folder / "config.yaml")
    for place in places:
        for file in place.iterdir():
            os.replace(file, place.parent / file.name)
        place.rmdir()
    return bool(places)


def remove(folder: Path) -> None:
    """Removes what was set aside for good, the config last."""
    for place in reversed(places_of(folder)):
        for file in sorted(place.iterdir(), key=lambda file: file.name == "config.yaml"):
            file.unlink()
        place.rmdir()


def places_of(folder: Path) -> list[Path]:
    """Returns the hidden folders of a run's folder."""
    places = [folder / FORMER, folder / CHECKPOINTS / FORMER, *(folder / PICTURES).rglob(FORMER)]
    return [place for place in places if place.is_dir()]
