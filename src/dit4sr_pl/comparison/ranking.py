"""The order of the variants by each metric, next to the paper's (Table 3)."""

from collections.abc import Iterable, Sequence

import numpy as np
from scipy.stats import kendalltau

from dit4sr_pl.comparison import paper
from dit4sr_pl.comparison.dataset_table import DIGITS, DatasetTable

FEWEST = 3  # fewest variants that have an order


def variants_of(table: DatasetTable) -> dict[str, int]:
    """Returns the places of the rows that the paper's Table 3 has too, by its letters."""
    places = {paper.VARIANTS.get(row.variant): place for place, row in enumerate(table.rows)}
    return {letter: place for letter, place in places.items() if letter is not None}


def orders(table: DatasetTable) -> list[list[str]]:
    """Returns a line for each of the paper's metrics, then for each of ours.

    A line holds the metric, the variants from best to worst, and Kendall's tau to each of the paper's orders: of the
    means and, if there are several seeds, of every seed. There are no lines for fewer than three variants; metrics that
    not all variants have are left out.
    """
    places = variants_of(table)
    if len(places) < FEWEST:
        return []
    theirs = paper.ablation(list(places))
    lines = [[f"the paper's {name}", order(places, values, 1), *[""] * len(theirs)] for name, values in theirs.items()]
    for column, (metric, lower) in enumerate(zip(table.metrics, table.lower, strict=True)):
        means = table.means[list(places.values()), column]
        if lower is not None and not np.isnan(means).any():
            sign = -1 if lower else 1
            scores = [means, *by_seed(table, list(places.values()), metric)]
            taus = [agreement([sign * values for values in scores], those) for those in theirs.values()]
            lines.append([metric, order(places, means, sign), *taus])
    return lines


def order(letters: Iterable[str], values: Sequence[float], sign: int) -> str:
    """Returns the variants with their values, the best first; `sign` is -1 where lower is better."""
    named = sorted(zip(values, letters, strict=True), key=lambda pair: -sign * pair[0])
    return ", ".join(f"{letter} {value:.{DIGITS}f}" for value, letter in named)


def agreement(ours: Sequence[np.ndarray], theirs: Sequence[float]) -> str:
    """Returns Kendall's tau to the paper's values; `ours` holds the means, then those of every seed."""
    tau, *of_seeds = [f"{kendalltau(values, theirs).statistic:+.1f}" for values in ours]
    return f"{tau} ({', '.join(of_seeds)})" if len(of_seeds) > 1 else tau


def by_seed(table: DatasetTable, places: Sequence[int], metric: str) -> list[np.ndarray]:
    """Returns means of the variants for every seed that all of them have."""
    rows = [{run.result.seed: run.result for run in table.rows[place].runs} for place in places]
    images = [table.rows[place].images for place in places]
    return [
        np.array(
            [np.mean([row[seed].of(image)[metric] for image in names]) for row, names in zip(rows, images, strict=True)]
        )
        for seed in sorted(set.intersection(*map(set, rows)))
    ]
