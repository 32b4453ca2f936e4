"""One dataset's part of a table: means and intervals of its rows, which are best, and tests against one of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dit4sr_pl.comparison.rows import Row
from dit4sr_pl.comparison.statistics import Resampling, holm

DIGITS = 3  # as the paper


@dataclass(frozen=True)
class Paired:
    """Two rows on the images that both have; arrays by metric, `nan` where one of them has none.

    Args:
        left_out: images that only one of them has. difference: mean of the row's scores less the other's.
        p: of the sign-flip permutation test. p_holm: corrected for all tests of the dataset, rows times metrics.
    """

    images: int
    left_out: list[str]
    difference: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    p_holm: np.ndarray


@dataclass(frozen=True)
class DatasetTable:
    """Arrays are `(rows, metrics)`, `nan` where not measured.

    Args:
        lower: by metric whether lower is better, None where nobody says.
        ranks: 1 best, 2 second best, 0 neither.
        against: place of the row that `paired`, by place of the others, is tested against; None if it is not there.
    """

    dataset: str
    metrics: list[str]
    lower: list[bool | None]
    rows: list[Row]
    labels: list[str]
    means: np.ndarray
    low: np.ndarray
    high: np.ndarray
    ranks: np.ndarray
    against: int | None
    paired: dict[int, Paired]


def make_dataset_table(
    dataset: str,
    rows: Sequence[Row],
    labels: Sequence[str],
    metrics: Sequence[str],
    lower: Mapping[str, bool],
    resampling: Resampling,
    against: str,
) -> DatasetTable:
    """`against` is a label, or none that is there."""
    directions = [lower.get(metric) for metric in metrics]
    means = np.stack([row.scores.mean(axis=0) for row in rows])
    low, high = np.stack([resampling.interval(row.scores) for row in rows], axis=1)
    place = labels.index(against) if against in labels else None
    paired = {} if place is None else compare_rows(rows, place, resampling)
    ranks = rank(means, directions)
    return DatasetTable(dataset, list(metrics), directions, rows, labels, means, low, high, ranks, place, paired)


def rank(means: np.ndarray, lower: Sequence[bool | None]) -> np.ndarray:
    """1 for the best of each column, 2 for the second best, both with all that print the same number.

    Columns without a direction or with a single number have no best.
    """
    ranks = np.zeros(means.shape, dtype=int)
    printed = np.array([[float(f"{value:.{DIGITS}f}") for value in row] for row in means])
    for column, is_lower in enumerate(lower):
        values = printed[:, column]
        if is_lower is None or np.count_nonzero(~np.isnan(values)) < 2:
            continue
        best = sorted(set(values[~np.isnan(values)]), reverse=not is_lower)
        for number, value in enumerate(best[:2], 1):
            ranks[values == value, column] = number
    return ranks


def compare_rows(rows: Sequence[Row], against: int, resampling: Resampling) -> dict[int, Paired]:
    """Every other row with the one at `against`, by its place."""
    others = [place for place in range(len(rows)) if place != against]
    pairs = [compare_pair(rows[place], rows[against], resampling) for place in others]
    if not pairs:
        return {}
    corrected = holm(np.stack([pair["p"] for pair in pairs]))
    return {place: Paired(**pair, p_holm=p) for place, pair, p in zip(others, pairs, corrected, strict=True)}


def compare_pair(row: Row, other: Row, resampling: Resampling) -> dict:
    common = [image for image in row.images if image in set(other.images)]
    left_out = sorted(set(row.images) ^ set(other.images))
    if not common:
        nothing = np.full(row.scores.shape[1], np.nan)
        return dict(images=0, left_out=left_out, difference=nothing, low=nothing, high=nothing, p=nothing)
    differences = row.of(common) - other.of(common)
    low, high = resampling.interval(differences)
    return dict(
        images=len(common),
        left_out=left_out,
        difference=differences.mean(axis=0),
        low=low,
        high=high,
        p=resampling.p_values(differences),
    )
