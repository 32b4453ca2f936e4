"""The paper's Table 1 and Table 3 from dataset tables, as Markdown, LaTeX and CSV."""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dit4sr_pl.common.markdown import markdown_table
from dit4sr_pl.comparison import paper
from dit4sr_pl.comparison.dataset_table import DIGITS, DatasetTable, of_sets
from dit4sr_pl.comparison.ranking import orders
from dit4sr_pl.comparison.rows import order, row_label, variant_label
from dit4sr_pl.comparison.statistics import Resampling
from dit4sr_pl.scores import results

ARROWS = {True: " ↓", False: " ↑", None: ""}
LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "[": "{[}",  # after `\\` it would start an option
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
}
# Columns of the CSV with the fields of `Paired` that they hold.
TESTED = {
    "difference": "difference",
    "difference_low": "low",
    "difference_high": "high",
    "p": "p",
    "p_holm": "p_holm",
}
ORDERS = ["by", "from best to worst", *(f"tau to the paper's {name}" for name in paper.ablation(["FULL"]))]
HOW_TO_READ_ORDERS = (
    "tau: Kendall's, +1.0 if all pairs of variants are in the paper's order, -1.0 if none is; "
    "in brackets that of each seed."
)


@dataclass(frozen=True)
class Cell:
    """A cell: its text, its rank (1 best, 2 second best), and what follows the text in small print."""

    text: str
    rank: int = 0
    aside: str = ""


Line = list[Cell]


def labels_of(paper_table: int, keys: Sequence[tuple[str, str]]) -> list[str]:
    """Returns names of rows by (method, variant); Table 3 holds one method's variants and leaves the method out."""
    return [
        variant_label(variant) if paper_table == 3 and variant else row_label(method, variant)
        for method, variant in keys
    ]


def header(paper_table: int, table: DatasetTable) -> list[str]:
    """Returns the names of the columns."""
    first = ["variant", *(switch.removeprefix("lr_") for switch in paper.SWITCHES)] if paper_table == 3 else ["method"]
    metrics = [metric + ARROWS[lower] for metric, lower in zip(table.metrics, table.lower, strict=True)]
    return [*first, "images", "seeds", *metrics]


def lines(paper_table: int, table: DatasetTable, which: str) -> Iterator[Line]:
    """Yields each row and after it the paper's; `which` selects the paper's rows: `runs`, `all` or `none`."""
    places = {(row.method, row.variant): place for place, row in enumerate(table.rows)}
    for key in sorted({*places, *(absent(paper_table, table) if which == "all" else [])}, key=lambda key: order(*key)):
        (label,) = labels_of(paper_table, [key])
        variant = [Cell(text) for text in paper.switches(key[1])] if paper_table == 3 else []
        if key in places:
            row = table.rows[places[key]]
            counts = [Cell(str(len(row.images))), Cell(str(len(row.runs)))]
            yield [Cell(label), *variant, *counts, *scores(table, places[key])]
        numbers = [paper.number(table.dataset, *key, metric) for metric in table.metrics]
        if which != "none" and not all(map(math.isnan, numbers)):
            yield [Cell(f"{label} (paper)"), *variant, Cell(""), Cell(""), *(Cell(fixed(value)) for value in numbers)]


def absent(paper_table: int, table: DatasetTable) -> list[tuple[str, str]]:
    """Returns the paper's rows of methods and variants that were not run."""
    there = {(row.method, "" if row.variant == "full" and paper_table == 1 else row.variant) for row in table.rows}
    keys = (
        [(method, "") for method in paper.methods()]
        if paper_table == 1
        else [("DiT4SR", name) for name in paper.VARIANTS]
    )
    return [key for key in keys if key not in there]


def scores(table: DatasetTable, place: int) -> Line:
    """Returns the cells of a row's scores."""
    columns = (table.means[place], table.low[place], table.high[place], table.ranks[place])
    return [Cell(fixed(mean), rank, interval(low, high)) for mean, low, high, rank in zip(*columns, strict=True)]


def differences(table: DatasetTable) -> Iterator[Line]:
    """Yields the differences of each row to the one that it is tested against."""
    for place, pair in table.paired.items():
        columns = zip(pair.difference, pair.low, pair.high, pair.p_holm, strict=True)
        tests = [
            Cell(fixed(mean, "+"), aside=" ".join(filter(None, [interval(low, high), p_value(p)])))
            for mean, low, high, p in columns
        ]
        yield [Cell(table.labels[place]), Cell(str(pair.images)), *tests]


def fixed(value: float, sign: str = "") -> str:
    """Returns a number with the paper's three decimals; empty for `nan`. With `sign="+"` positive ones get a sign."""
    return "" if math.isnan(value) else f"{value:{sign}z.{DIGITS}f}"


def interval(low: float, high: float) -> str:
    """Returns an interval in brackets; empty for `nan`."""
    return "" if math.isnan(low) else f"[{fixed(low)}, {fixed(high)}]"


def p_value(p: float) -> str:
    """Returns a p-value as text, such as `p=0.012` or `p<0.001`; empty for `nan`."""
    return "" if math.isnan(p) else "p<0.001" if p < 0.001 else f"p={p:.3f}"


def notes(table: DatasetTable) -> Iterator[str]:
    """Yields what a reader of this table must know."""
    for label, row in zip(table.labels, table.rows, strict=True):
        if row.left_out:
            yield f"{label}: left out, not scored with every seed: {', '.join(row.left_out)}."
    runs = [run for row in table.rows for run in row.runs]
    for place, run in enumerate(runs):
        if same := [str(other.folder) for other in runs[:place] if str(other.result.scores) == str(run.result.scores)]:
            yield f"Equal scores of every image: {', '.join(same)}, {run.folder}."
    for metric, lower in zip(table.metrics, table.lower, strict=True):
        if lower is None:
            yield f"{metric}: nothing in conf/metrics/ says whether lower is better; its best is not marked."
    for metric in of_sets(table.rows):
        yield f"{metric}: a score of the whole set, without interval and test."
    versions = [run.result.versions for row in table.rows for run in row.runs]
    for package in sorted(set().union(*versions)):
        if len(found := {version.get(package, "none") for version in versions}) > 1:
            yield f"Scored with {package} {' and '.join(sorted(found))}: scores may differ for that alone."
    for place, pair in table.paired.items():
        if pair.left_out:
            yield f"{table.labels[place]}: tested without images that one of the two lacks: {', '.join(pair.left_out)}."


def markdown(paper_table: int, tables: Sequence[DatasetTable], which: str, against: str, resampling: Resampling) -> str:
    """Returns all tables as one Markdown text."""
    parts = []
    for table in tables:
        parts += [
            f"## {table.dataset}",
            markdown_table(header(paper_table, table), markdown_rows(lines(paper_table, table, which))),
        ]
        if table.paired:
            title = [f"difference to {against}", "images", *table.metrics]
            parts += [markdown_table(title, markdown_rows(differences(table)))]
        if paper_table == 3 and (found := orders(table)):
            parts += [markdown_table(ORDERS, found), HOW_TO_READ_ORDERS]
        parts += ["\n".join(f"- {note}" for note in notes(table))]
    return "\n\n".join(filter(None, [*parts, how_to_read(tables, against, resampling)])) + "\n"


def how_to_read(tables: Sequence[DatasetTable], against: str, resampling: Resampling) -> str:
    """Returns the paragraph that explains intervals, ranks and tests."""
    text = (
        f"Means over images, [{100 * resampling.level:g}% intervals]: percentile bootstrap over images, "
        f"{resampling.resamples} resamples, seed {resampling.seed}; seeds of a row are averaged image by image before. "
        "**Best**, <u>second best</u> of the rows that were run, equal if they print equally. "
    )
    if any(table.paired for table in tables):
        return text + (
            f"Differences to {against} on the images that both have; p: two-sided paired sign-flip permutation test, "
            "Holm-corrected for all tests of the dataset."
        )
    return text + f"No tests: {against} and another row must be there (against=ROW takes another)."


def markdown_rows(lines: Iterable[Line]) -> Iterator[list[str]]:
    """Yields the texts of Markdown cells, with the best in bold and the second best underlined."""
    for line in lines:
        yield [f"{('{}', '**{}**', '<u>{}</u>')[cell.rank].format(cell.text)} {cell.aside}".rstrip() for cell in line]


def latex(paper_table: int, tables: Sequence[DatasetTable], which: str) -> str:
    r"""Returns a `tabular` for `\usepackage{booktabs}` with one table per dataset."""
    head = header(paper_table, tables[0])
    body = [" & ".join(map(escaped, head))]
    for table in tables:
        title = rf"\multicolumn{{{len(head)}}}{{l}}{{\textit{{{escaped(table.dataset)}}}}}"
        body += [
            rf"\midrule {title}",
            *(" & ".join(map(latex_cell, line)) for line in lines(paper_table, table, which)),
        ]
    columns = "l" * (len(head) - len(tables[0].metrics)) + "c" * len(tables[0].metrics)
    rows = "".join(f"{row} \\\\\n" for row in body)
    return f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{rows}\\bottomrule\n\\end{{tabular}}\n"


def latex_cell(cell: Cell) -> str:
    """Returns a cell in LaTeX."""
    text = ("{}", r"\textbf{{{}}}", r"\underline{{{}}}")[cell.rank].format(escaped(cell.text))
    return text + (rf" {{\scriptsize {escaped(cell.aside)}}}" if cell.aside else "")


def escaped(text: str) -> str:
    """Returns a text with LaTeX's special characters escaped."""
    return "".join(LATEX.get(character, character) for character in text)


def csv_table(tables: Sequence[DatasetTable]) -> str:
    """Returns a line per dataset, row and metric with all digits; cells are empty where not measured or not tested."""
    file = io.StringIO(newline="")
    records = [record for table in tables for record in csv_records(table)]
    writer = csv.DictWriter(file, records[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: results.cell(value) for name, value in record.items()} for record in records)
    return file.getvalue()


def csv_records(table: DatasetTable) -> Iterator[dict]:
    """Yields the records of one dataset."""
    for place, row in enumerate(table.rows):
        pair = table.paired.get(place)
        for column, metric in enumerate(table.metrics):
            tested = {name: float(getattr(pair, field)[column]) if pair else "" for name, field in TESTED.items()}
            yield {
                "dataset": table.dataset,
                "method": row.method,
                "variant": row.variant,
                "metric": metric,
                "images": len(row.images),
                "seeds": len(row.runs),
                "mean": float(table.means[place, column]),
                "low": float(table.low[place, column]),
                "high": float(table.high[place, column]),
                "rank": int(table.ranks[place, column]) or "",
                "paper": paper.number(table.dataset, row.method, row.variant, metric),
                "paired_images": pair.images if pair else "",
            } | tested
