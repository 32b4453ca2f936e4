"""Scores of a whole set of images, such as FID, which are measured when all of its images are there."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from dit4sr_pl.common.hashing import file_hash, values_hash
from dit4sr_pl.evaluation.benchmark_sets import SCALE, Item, read
from dit4sr_pl.images.files import find_images, write_image
from dit4sr_pl.scores.metrics import SetScore
from dit4sr_pl.scores.results import read_result
from dit4sr_pl.scores.weight_files import is_of_set


def image_metrics(metrics: Mapping[str, dict]) -> dict[str, dict]:
    """Returns the options of the metrics that score single images."""
    return {name: options for name, options in metrics.items() if not is_of_set(options)}


def folder_hash(folder: Path) -> str:
    """Returns the hash of a folder's images and their names."""
    return values_hash({str(path.relative_to(folder)): file_hash(path) for path in find_images(folder)})


def set_scores(
    items: Sequence[Item], metrics: Mapping[str, SetScore], wanted: Mapping[str, dict], folder: Path
) -> dict:
    """Returns the scores of a set by name.

    Scores in the result that a folder holds are kept, except those whose weights were missing.

    Args:
        items: all images, restored.
        metrics: the metrics of this command.
        wanted: options of all metrics of the evaluation, with `measured`.
        folder: the evaluation's output folder.
    """
    known, scores = {}, {}
    with suppress(OSError, ValueError):  # there is none yet, or it is about to be replaced
        known = read_result(folder).set_scores
    for name in (name for name, options in wanted.items() if is_of_set(options)):
        if name in known and not (wanted[name]["measured"] and math.isnan(known[name])):
            scores[name] = known[name]
        elif name in metrics:
            scores[name] = set_score(metrics[name], items)
    return scores


def set_score(metric: SetScore, items: Sequence[Item]) -> float:
    """Returns one score of a set; its reference images are the ground truth or those of the metric's folder."""
    with tempfile.TemporaryDirectory() as below:
        restored, reference = Path(below, "restored"), Path(below, "reference")
        gather(restored, [item.sr for item in items])
        if metric.folder is not None:
            gather(reference, find_images(metric.folder))
        else:
            gather(reference, [item.hr for item in items], items[0].crop)
        return metric(restored, reference)


def gather(folder: Path, paths: Sequence[Path], crop: int | None = None) -> None:
    """Makes a folder of images: links, or the centre crops that other metrics see."""
    folder.mkdir()
    for number, path in enumerate(paths):
        target = folder / f"{number:07d}.png"  # whatever the format: readers look at the contents
        if crop is None:
            target.symlink_to(path.resolve())
        else:
            write_image(target, read(path, crop, SCALE)[0])
