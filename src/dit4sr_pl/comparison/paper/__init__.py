"""The paper's numbers: `benchmarks.csv` is Table 1, `ablation.csv` is Table 3, `complexity.csv` is its table
of parameters and times."""

import csv
from collections.abc import Sequence
from functools import cache
from pathlib import Path

# Rows of Table 3 by their names in conf/ablation/.
VARIANTS = {
    "full": "FULL",
    "no_lr_integration": "A",
    "no_lr_residual": "B",
    "no_lr_injection": "C",
    "linear_lr_injection": "D",
}
SWITCHES = ("lr_integration", "lr_residual", "lr_injection")


@cache
def read(name: str) -> tuple[dict[str, str], ...]:
    """Returns the rows of one table."""
    with (Path(__file__).parent / f"{name}.csv").open(newline="") as file:
        return tuple(csv.DictReader(file))


def methods() -> list[str]:
    """Returns the methods in Table 1's order."""
    return list(dict.fromkeys(row["method"] for row in read("benchmarks")))


def spelling(dataset: str) -> str:
    """Returns the paper's spelling of a dataset in any letter case: `realsr` is RealSR; other names stay."""
    names = {row["dataset"].casefold(): row["dataset"] for row in read("benchmarks")}
    return names.get(dataset.casefold(), dataset)


def switches(variant: str) -> list[str]:
    """Returns Table 3's cells for a variant's switches; empty cells for a variant that it does not have."""
    (row,) = [row for row in read("ablation") if row["variant"] == VARIANTS.get(variant)] or [{}]
    return [row.get(switch, "") for switch in SWITCHES]


def ablation(letters: Sequence[str]) -> dict[str, list[float]]:
    """Returns Table 3's columns for some of its variants, such as `musiq on RealLQ250`; higher is better in all of
    them.
    """
    rows = {row["variant"]: row for row in read("ablation")}
    metrics = [name for name in rows["FULL"] if name not in ("variant", "dataset", *SWITCHES)]
    return {
        f"{name} on {rows['FULL']['dataset']}": [float(rows[letter][name]) for letter in letters] for name in metrics
    }


def number(dataset: str, method: str, variant: str, metric: str) -> float:
    """Returns the number that the paper reports; `nan` if it reports none.

    Table 3 comes first for a variant whose dataset and metric it has, then Table 1 for a method or its full variant.
    """
    dataset = spelling(dataset)
    found = [
        row[metric]
        for row in read("ablation")
        if method == "DiT4SR" and (row["dataset"], row["variant"]) == (dataset, VARIANTS.get(variant)) and metric in row
    ]
    if variant in ("", "full"):
        wanted = (dataset, method, metric)
        found += [
            row["value"] for row in read("benchmarks") if (row["dataset"], row["method"], row["metric"]) == wanted
        ]
    return float(found[0]) if found else float("nan")
