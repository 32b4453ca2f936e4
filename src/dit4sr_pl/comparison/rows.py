"""The results that are compared: finding them, and the rows of a table that they make."""

import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dit4sr_pl.common.run_identity import differences
from dit4sr_pl.comparison import paper
from dit4sr_pl.scores.results import ROW, Result, read_result


@dataclass(frozen=True)
class Run:
    """A result and its folder."""

    folder: Path
    result: Result

    @property
    def label(self) -> str:
        """Label of the run's row."""
        return row_label(self.result.method, self.result.variant)

    @property
    def pictures(self) -> Path | None:
        """Folder of the scored images; None if they were not kept."""
        return self.folder / self.result.pictures if self.result.pictures else None


@dataclass(frozen=True)
class Row:
    """One method or variant on one dataset.

    Args:
        runs: its runs, one per seed, in the order of seeds.
        images: images that were scored with every seed.
        left_out: images that were not.
        scores: means over seeds, `(images, metrics)`; `nan` where not measured.
    """

    runs: list[Run]
    images: list[str]
    left_out: list[str]
    scores: np.ndarray

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.runs[0].result.method

    @property
    def variant(self) -> str:
        """Name of the variant, may be empty."""
        return self.runs[0].result.variant

    @property
    def label(self) -> str:
        """Label of the row."""
        return self.runs[0].label

    def of(self, images: Sequence[str]) -> np.ndarray:
        """Returns scores `(images, metrics)` of some of the images, in their order."""
        place = {image: number for number, image in enumerate(self.images)}
        return self.scores[[place[image] for image in images]]


def row_label(method: str, variant: str) -> str:
    """Returns the label of a method or variant."""
    return f"{method} {variant_label(variant)}".rstrip()


def variant_label(variant: str) -> str:
    """Returns the variant's name in Table 3, `FULL` or `A: no_lr_integration`; another variant keeps its own name."""
    letter = paper.VARIANTS.get(variant)
    return variant if letter is None else letter if variant == "full" else f"{letter}: {variant}"


def find_runs(paths: Iterable[str]) -> list[Run]:
    """Returns every result that paths name: a folder or a file of one, a folder above several, or a glob of such.

    Raises:
        FileNotFoundError: a path holds no results.
        ValueError: a result is damaged, or a run appears twice: by its folder, or by what it is.
    """
    found: dict[Path, str] = {}
    for path in paths:
        for folder in find_folders(path):
            if folder.resolve() in found:
                raise ValueError(f"{folder}: named twice, by {found[folder.resolve()]} and by {path}; name it once")
            found[folder.resolve()] = path
    runs = [Run(folder, read_result(folder)) for folder in map(shorter, found)]
    check_distinct(runs)
    return runs


def find_folders(path: str) -> list[Path]:
    """Returns the folders of the results that one path names."""
    matches = [path] if Path(path).exists() else sorted(glob.glob(path, recursive=True))
    if not matches:
        raise FileNotFoundError(f"{path}: no such file or folder")
    # A glob may match several files of one folder, and `**` may match nested folders.
    folders: dict[Path, None] = {}
    for match in map(Path, matches):
        files = sorted(match.rglob(f"{ROW}.parquet")) if match.is_dir() else [match.parent / f"{ROW}.parquet"]
        folders |= dict.fromkeys(file.parent for file in files if file.is_file())
    if not folders:
        raise FileNotFoundError(f"{path}: no {ROW}.parquet in it or below; `evaluate` and finished trainings write it")
    return list(folders)


def shorter(folder: Path) -> Path:
    """Returns a folder relative to the working folder if it lies below it."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def check_distinct(runs: Iterable[Run]) -> None:
    """Raises ValueError if two runs have the same method, variant, dataset and seed."""
    seen: dict[tuple, Path] = {}
    for run in runs:
        result = run.result
        names = (result.method, result.variant, paper.spelling(result.dataset), result.seed)
        what = f"{run.label} on {result.dataset} with seed {result.seed}"
        if names in seen:
            raise ValueError(
                f"{seen[names]} and {run.folder}: both are {what}; leave one out, or evaluate with dataset= and name= "
                "that tell them apart"
            )
        seen[names] = run.folder


def metrics_of(runs: Iterable[Run]) -> list[str]:
    """Returns all metrics of the runs, in the order of their appearance."""
    return list(dict.fromkeys(metric for run in runs for metric in run.result.metrics))


def make_rows(runs: Iterable[Run], metrics: Sequence[str]) -> dict[str, list[Row]]:
    """Returns rows by dataset in the paper's spelling, sorted as in the paper's tables."""
    seeds: dict[str, dict[tuple[str, str], list[Run]]] = {}
    for run in sorted(runs, key=lambda run: (order(run.result.method, run.result.variant), run.result.seed)):
        result = run.result
        dataset = seeds.setdefault(paper.spelling(result.dataset), {})
        dataset.setdefault((result.method, result.variant), []).append(run)
    rows = {dataset: [average(runs, metrics) for runs in named.values()] for dataset, named in seeds.items()}
    for dataset, (first, *others) in rows.items():
        for other in others:
            if not set(first.images) & set(other.images):
                folders = f"{first.runs[0].folder} and {other.runs[0].folder}"
                raise ValueError(
                    f"{folders}: both of {dataset}, without a common image; evaluate them with dataset=NAME"
                )
    return rows


def order(method: str, variant: str) -> tuple:
    """Returns a sort key: methods that the paper does not have come first, by name; other variants come last."""
    methods, variants = paper.methods(), ["", *paper.VARIANTS]
    place = methods.index(method) if method in methods else -1
    return place, method, variants.index(variant) if variant in variants else len(variants), variant


def check_one_network(runs: Sequence[Run]) -> None:
    """Raises ValueError if two runs of one row are of different networks; results of 0.1 do not say theirs."""
    known = [run for run in runs if run.result.network]
    for first, other in zip(known, known[1:], strict=False):
        ours, theirs = (run.result.network | run.result.network.get("variant", {}) for run in (first, other))
        if different := [key for key in differences(ours, theirs) if key != "variant"]:
            values = ", ".join(f"{key} {ours.get(key)} and {theirs.get(key)}" for key in different)
            raise ValueError(
                f"{first.folder} and {other.folder}: seeds of {first.label} with different networks ({values}); "
                "evaluate one of them with name=NAME, or leave it out"
            )


def average(runs: Sequence[Run], metrics: Sequence[str]) -> Row:
    """Returns the row of one method's seeds, averaged image by image.

    Raises:
        ValueError: the seeds have no common image, or two of them are of different networks.
    """
    check_one_network(runs)
    scores = [run.result.scores for run in runs]
    everywhere = set(scores[0]).intersection(*scores)
    if not everywhere:
        raise ValueError(
            f"{runs[0].folder} and {runs[1].folder}: seeds of {runs[0].label} without a common image; leave one out"
        )
    images = [image for image in scores[0] if image in everywhere]
    left_out = sorted(set().union(*scores) - everywhere)
    table = [[[run.result.of(image).get(metric, np.nan) for metric in metrics] for image in images] for run in runs]
    return Row(list(runs), images, left_out, np.mean(table, axis=0))
