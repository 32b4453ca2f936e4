"""Bar charts of dataset tables."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dit4sr_pl.common.files import atomic_write
from dit4sr_pl.comparison import paper
from dit4sr_pl.comparison.dataset_table import DatasetTable
from dit4sr_pl.comparison.tables import ARROWS


def bar_chart(table: DatasetTable) -> Figure:
    """Returns one panel per measured metric: means from zero with their intervals, the paper's numbers as diamonds."""
    columns = [column for column in range(len(table.metrics)) if not np.isnan(table.means[:, column]).all()]
    size = (2.5 + 2.4 * max(1, len(columns)), 1.6 + 0.35 * len(table.rows))
    figure = Figure(size, layout="constrained")
    panels = figure.subplots(1, max(1, len(columns)), sharey=True, squeeze=False)[0]
    places = np.arange(len(table.rows))
    for panel, column in zip(panels, columns, strict=False):
        means = table.means[:, column]
        spread = np.abs(np.stack([table.low[:, column], table.high[:, column]]) - means)
        panel.barh(places, means, xerr=spread, color="#9ecae1", error_kw={"capsize": 2, "lw": 1})
        metric = table.metrics[column]
        numbers = [paper.number(table.dataset, row.method, row.variant, metric) for row in table.rows]
        panel.plot(numbers, places, "kD", markersize=4)
        panel.set_title(metric + ARROWS[table.lower[column]])
    panels[0].set_yticks(places, table.labels)
    panels[0].invert_yaxis()
    figure.suptitle(table.dataset)
    return figure


def write_chart(table: DatasetTable, path: Path) -> list[Path]:
    """Writes the chart as PNG and PDF and returns the files; they hold no date, so equal charts are equal files."""
    figure = bar_chart(table)
    written = []
    for kind, options in (("png", {"dpi": 150}), ("pdf", {"metadata": {"CreationDate": None}})):
        with atomic_write(path.with_name(f"{path.name}.{kind}")) as partial:
            figure.savefig(partial, format=kind, **options)
        written.append(path.with_name(f"{path.name}.{kind}"))
    return written
