"""One dataset's rows of a table: means and intervals, the best ones, and tests against one of the rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dit4sr_pl.comparison.rows import Row
from dit4sr_pl.comparison.statistics import Resampling, holm

DIGITS = 3  # decimals, as in the paper


@dataclass(frozen=True)
class Paired:
    """Two rows on the images that both have; arrays by metric, `nan` where a row has none.

    Args:
        images: number of common images.
        left_out: images that only one of them has.
        difference: mean of the row's scores minus the other's.
        low: lower ends of the intervals of the difference.
        high: upper ends.
        p: p-values of the sign-flip permutation test.
        p_holm: p-values corrected for all tests of the dataset, rows times metrics.
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
    """The numbers of one dataset. Arrays are `(rows, metrics)`, `nan` where not measured.

    Args:
        dataset: name in the paper's spelling.
        metrics: names of the columns.
        lower: by metric whether lower is better; None: unknown.
        rows: the rows.
        labels: their labels.
        means: means over images.
        low: lower ends of their intervals.
        high: upper ends.
        ranks: 1 for the best, 2 for the second best, 0 otherwise.
        against: place of the row that others are tested against; None if it is not there.
        paired: the tests, by the place of the other row.
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
    """Returns the table of one dataset; `against` is a label, or a word that is no label for a table without tests."""
    directions = [lower.get(metric) for metric in metrics]
    means = np.stack([row.scores.mean(axis=0) for row in rows])
    whole = np.isin(list(metrics), of_sets(rows))  # one number each, so that there is nothing to resample
    low, high = np.stack([resampling.interval(np.where(whole, np.nan, row.scores)) for row in rows], axis=1)
    place = labels.index(against) if against in labels else None
    paired = {} if place is None else compare_rows(rows, place, resampling, whole)
    ranks = rank(means, directions)
    return DatasetTable(dataset, list(metrics), directions, rows, labels, means, low, high, ranks, place, paired)


def of_sets(rows: Sequence[Row]) -> list[str]:
    """Returns the metrics that score whole sets, such as FID."""
    return sorted({metric for row in rows for run in row.runs for metric in run.result.set_scores})


def rank(means: np.ndarray, lower: Sequence[bool | None]) -> np.ndarray:
    """Returns 1 for the best of each column and 2 for the second best; values that print equally share a rank.

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


def compare_rows(rows: Sequence[Row], against: int, resampling: Resampling, whole: np.ndarray) -> dict[int, Paired]:
    """Tests every other row against the one at `against`, except by metrics of whole sets; returns the tests by place.

    Args:
        rows: the rows.
        against: place of the row that the others are tested against.
        resampling: how to test.
        whole: by metric whether it scores whole sets.
    """
    others = [place for place in range(len(rows)) if place != against]
    pairs = [compare_pair(rows[place], rows[against], resampling, whole) for place in others]
    if not pairs:
        return {}
    corrected = holm(np.stack([pair["p"] for pair in pairs]))
    return {place: Paired(**pair, p_holm=p) for place, pair, p in zip(others, pairs, corrected, strict=True)}


def compare_pair(row: Row, other: Row, resampling: Resampling, whole: np.ndarray) -> dict:
    """Tests one row against another on their common images; returns fields of `Paired`.

    A score of a whole set has a difference only if both have scored the same images.
    """
    common = [image for image in row.images if image in set(other.images)]
    left_out = sorted(set(row.images) ^ set(other.images))
    if not common:
        nothing = np.full(row.scores.shape[1], np.nan)
        return dict(images=0, left_out=left_out, difference=nothing, low=nothing, high=nothing, p=nothing)
    differences = row.of(common) - other.of(common)
    if left_out:
        differences = np.where(whole, np.nan, differences)
    tested = np.where(whole, np.nan, differences)
    low, high = resampling.interval(tested)
    return dict(
        images=len(common),
        left_out=left_out,
        difference=differences.mean(axis=0),
        low=low,
        high=high,
        p=resampling.p_values(tested),
    )
