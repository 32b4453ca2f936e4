"""The files that scoring writes into a folder, and that `compare` reads:

    scores.csv                     per image: `image`, then one column per metric; empty where it was not measured
    results.csv, results.parquet   one row: what was scored, its mean scores, and what it takes to score it again
    images/                        the scored images as PNG by name, where the command made them

No PyTorch, so that tables of many runs are read quickly.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from dit4sr_pl.common.files import atomic_write
from dit4sr_pl.common.hashing import values_hash

SCORES, ROW, PICTURES = "scores.csv", "results", "images"
MEASURED_WITH = ("torch", "lightning", "diffusers", "spandrel", "pyiqa", "pillow", "dit4sr_pl")


@dataclass(frozen=True)
class Result:
    """Scores of one set of restored images.

    Args:
        run: a readable name, such as `demo/no_lr_residual/seed0`.
        method: row of the paper's Table 1, such as `DiT4SR` or `Bicubic`.
        variant: row of the paper's Table 3 by its name in `conf/ablation/`; empty if there are no variants.
        dataset: name in `conf/dataset/`.
        seed: seed of the sampler's noise, or of the training whose validation this is.
        pictures: folder of the scored images relative to the result's folder; empty if they were not kept.
        identity_hash: hash of the settings that scores depend on.
        weights_hash: hash of the weights; empty without any.
        network: the network's config, see `network_config`; empty for other systems.
        versions: versions of the packages that scores depend on.
        scores: scores by image and metric; `nan` where a metric was not measured.
        set_scores: scores of the whole set by metric, such as FID.
    """

    run: str
    method: str
    variant: str
    dataset: str
    seed: int
    pictures: str
    identity_hash: str
    weights_hash: str
    versions: dict[str, str]
    scores: dict[str, dict[str, float]]
    network: dict = field(default_factory=dict)
    set_scores: dict[str, float] = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics, those of the whole set last."""
        return [*next(iter(self.scores.values())), *self.set_scores]

    @property
    def means(self) -> dict[str, float]:
        """Means over all images, `nan` if an image was not measured; then the scores of the whole set."""
        metrics = next(iter(self.scores.values()))
        columns = {metric: [scores[metric] for scores in self.scores.values()] for metric in metrics}
        return {metric: math.fsum(values) / len(values) for metric, values in columns.items()} | self.set_scores

    def of(self, image: str) -> dict[str, float]:
        """Returns the scores of an image, and those of its set."""
        return self.scores[image] | self.set_scores


FIELDS = ("run", "method", "variant", "dataset", "seed", "pictures", "identity_hash", "weights_hash")
FORMER_NAMES = {"identity_hash": "config", "weights_hash": "checkpoint"}  # columns of results written before 0.2


def write_result(result: Result, folder: Path) -> None:
    """Writes `scores.csv`, `results.csv` and `results.parquet`, each atomically; the row comes after the scores."""
    write_scores(result.scores, folder / SCORES)
    row = {name: getattr(result, name) for name in FIELDS}
    row |= {
        "network": json.dumps(result.network),
        "versions": json.dumps(result.versions),
        "images": len(result.scores),
        "scores_hash": values_hash(result.scores),
        "set_scores": json.dumps(list(result.set_scores)),
    } | result.means
    table = pa.Table.from_pylist([row])
    with atomic_write(folder / f"{ROW}.parquet") as partial:
        pyarrow.parquet.write_table(table, partial)
    with atomic_write(folder / f"{ROW}.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow({name: cell(value) for name, value in row.items()})


def write_scores(scores: dict[str, dict[str, float]], path: Path) -> None:
    """Writes scores per image; the columns are those of the first image."""
    with atomic_write(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["image", *next(iter(scores.values()))])
        writer.writeheader()
        for image, values in scores.items():
            writer.writerow({"image": image} | {metric: cell(value) for metric, value in values.items()})


def cell(value: object) -> object:
    """Returns a value's cell: `nan` is empty, numbers keep all their digits."""
    return "" if isinstance(value, float) and math.isnan(value) else value


def run_name(output: Path | str) -> str:
    """Returns a run's name: its path below `outputs/`, such as `default/full/seed0`, or else its folder's name."""
    *above, name = Path(output).resolve().parts
    below = above[::-1].index("outputs") if "outputs" in above else 0
    return "/".join([*above[len(above) - below :], name])


def versions() -> dict[str, str]:
    """Returns the versions of the packages that scores depend on; spandrel, an extra, may be missing."""
    installed = {}
    for package in MEASURED_WITH:
        with suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def read_scores(path: Path) -> dict[str, dict[str, float]]:
    """Reads scores by image and metric; an empty cell is `nan`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no such table, or holds an image twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `evaluate` writes it")
    scores: dict[str, dict[str, float]] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; score it again") from None
    with io.StringIO(text, newline="") as file:
        rows = csv.DictReader(file)
        if not rows.fieldnames or rows.fieldnames[0] != "image":
            raise ValueError(
                f"{path}: not a table of scores (its columns must be `image`, then metrics); score it again"
            )
        for row in rows:
            image = row.pop("image")
            if image in scores:
                raise ValueError(f"{path}: {image} appears twice; score it again")
            try:
                scores[image] = {metric: float("nan" if value == "" else value) for metric, value in row.items()}
            except (TypeError, ValueError):
                raise ValueError(f"{path}: {image}: not a number in every column; score it again") from None
    if not scores:
        raise ValueError(f"{path}: no scores in this table; score it again")
    return scores


def read_result(folder: Path) -> Result:
    """Reads what `write_result` wrote into a folder.

    Raises:
        FileNotFoundError: the folder holds no result.
        ValueError: the files are no result.
    """
    path = folder / f"{ROW}.parquet"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no {ROW}.parquet in it; `evaluate` and finished trainings write it")
    try:
        row = pyarrow.parquet.read_table(path).to_pylist()[0]
        described = {name: row[name if name in row else FORMER_NAMES[name]] for name in FIELDS}
        described["versions"] = json.loads(row["versions"])
        described["network"] = json.loads(row.get("network", "{}"))  # results of 0.1 do not have it
        described["set_scores"] = {name: float(row[name]) for name in json.loads(row.get("set_scores", "[]"))}
    except (pa.ArrowException, OSError, LookupError, ValueError, TypeError) as error:
        if getattr(error, "errno", None) is not None:  # pyarrow's own OSErrors, of damaged files, have no number
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a result ({reason}); score it again") from None
    result = Result(**described, scores=read_scores(folder / SCORES))
    check_same_scores(row, result, folder)
    return result


def check_same_scores(row: Mapping, result: Result, folder: Path) -> None:
    """Raises ValueError unless number and means of the images in `scores.csv` are those of `results.parquet`."""
    means = {metric: row.get(metric) for metric in result.means}
    same = [
        isinstance(theirs, float)
        and (math.isclose(ours, theirs, rel_tol=1e-12) or (math.isnan(ours) and math.isnan(theirs)))
        for ours, theirs in zip(result.means.values(), means.values(), strict=True)
    ]
    hashes = None, values_hash(result.scores)  # results of 0.1 have none
    if row.get("images") != len(result.scores) or not all(same) or row.get("scores_hash") not in hashes:
        raise ValueError(
            f"{folder / SCORES}: not the scores of {ROW}.parquet ({len(result.scores)} images with means "
            f"{result.means}, and there {row.get('images')} with {means}); the file was cut off or changed, score it "
            "again"
        )
