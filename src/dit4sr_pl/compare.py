"""python -m dit4sr_pl.compare RUNS... [key=value ...]: tables, tests, charts and strips of finished runs"""

import functools
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dit4sr_pl.cli.checks import check_readable, check_writable
from dit4sr_pl.cli.command import command, conf_folder
from dit4sr_pl.common.files import atomic_write

# Options of Hydra's that take the next word
WITH_VALUE = {"--cfg", "-c", "--info", "-i", "--package", "-p", "--config-dir", "-cd", "--config-name", "-cn"}
REFERENCES = {1: ("DiT4SR", "DiT4SR FULL"), 3: ("FULL",)}


def main() -> None:
    """Separates paths from options and compares."""
    paths, sys.argv[1:] = split(sys.argv[1:])
    command("compare")(functools.partial(compare, paths))()


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns paths, and Hydra's arguments: options, and key=value for keys of `conf/compare.yaml`.

    Paths never pass through Hydra's grammar, in which `=`, commas and spaces have a meaning.
    """
    keys = "|".join(["hydra", *map(str, OmegaConf.load(conf_folder() / "compare.yaml"))])
    paths, for_hydra = [], []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_hydras = argument.startswith("-") or before in WITH_VALUE
        is_hydras = is_hydras or re.match(rf"(\+{{0,2}}({keys})(\.[\w.]+)?=|~({keys})\b)", argument)
        (for_hydra if is_hydras else paths).append(argument)
    return paths, for_hydra


def compare(paths: Sequence[str], cfg: DictConfig) -> None:
    """Prints and writes the tables, charts and strips of finished runs."""
    check(cfg)

    from dit4sr_pl.comparison.rows import find_runs, make_rows, metrics_of

    paths, output = [*paths, *cfg.runs], Path(cfg.output)
    if not paths:
        raise ValueError("no runs; give folders with results, or folders above them: compare RUNS...")
    runs = find_runs(paths)
    metrics, paper_table = metrics_of(runs), choose_table(cfg.table, runs)
    datasets = make_rows(runs, metrics)

    from dit4sr_pl.comparison.dataset_table import make_dataset_table
    from dit4sr_pl.comparison.statistics import Resampling
    from dit4sr_pl.comparison.tables import csv_table, labels_of, latex, markdown

    labels = [labels_of(paper_table, [(row.method, row.variant) for row in rows]) for rows in datasets.values()]
    against = choose_against(cfg.against, paper_table, [label for names in labels for label in names])
    lower, resampling = lower_is_better(), Resampling(**cfg.resampling)
    tables = [
        make_dataset_table(dataset, rows, names, metrics, lower, resampling, against)
        for (dataset, rows), names in zip(datasets.items(), labels, strict=True)
    ]
    text = markdown(paper_table, tables, cfg.paper, against, resampling)
    write(output / f"table{paper_table}.md", text)
    write(output / f"table{paper_table}.tex", latex(paper_table, tables, cfg.paper))
    write(output / f"table{paper_table}.csv", csv_table(tables))
    print(text)  # after the files, since a closed pipe ends the command
    draw(tables, output, cfg.strip)


def draw(tables: Sequence, output: Path, options: DictConfig) -> None:
    """Draws a chart and a strip of each table; strips, which read pictures, come last."""
    from dit4sr_pl.comparison.charts import write_chart
    from dit4sr_pl.comparison.strips import write_strip

    for table in tables:
        write_chart(table, output / f"chart_{file_name(table.dataset)}")
    for table in tables:
        for note in write_strip(table, output / f"strip_{file_name(table.dataset)}.png", **options):
            print(f"- {note}")
    print(f"written into {output}")


def check(cfg: DictConfig) -> None:
    """Checks everything that a user can get wrong and that shows without reading a run."""
    for key, choices in {"table": ["auto", 1, 3], "paper": ["runs", "all", "none"]}.items():
        if cfg[key] not in choices:
            raise ValueError(f"{key}={cfg[key]}; choose one of {', '.join(map(str, choices))}")
    if not 0 < cfg.resampling.level < 1:
        raise ValueError(f"resampling.level={cfg.resampling.level}: must be between 0 and 1, such as 0.95")
    if cfg.resampling.resamples < 1:
        raise ValueError(f"resampling.resamples={cfg.resampling.resamples}: must be 1 or more")
    strip = cfg.strip
    if strip.crop < 1:
        raise ValueError(f"strip.crop={strip.crop}: must be 1 or more pixels")
    if isinstance(strip.images, int) and strip.images < 1:
        raise ValueError(f"strip.images={strip.images}: must be 1 or more, or a list of names")
    if strip.at is not None and (len(strip.at) != 2 or min(strip.at) < 0):
        raise ValueError(f"strip.at={strip.at}: must be [x, y] in pixels")
    for key in ("lr", "hr"):
        if strip[key] is not None:
            check_readable(strip[key], f"strip.{key}")
    check_writable(cfg.output, "output")


def choose_table(wanted: int | str, runs: Sequence) -> int:
    """Returns 3 where several variants of one method were run, also next to methods without variants; otherwise 1.

    Raises:
        ValueError: a 3 is wanted without variants, or with those of several methods.
    """
    variants = {(run.result.method, run.result.variant) for run in runs if run.result.variant}
    methods = sorted({method for method, _ in variants})
    if wanted == "auto":
        return 3 if len(methods) == 1 and len(variants) > 1 else 1
    if wanted == 3 and len(methods) != 1:
        raise ValueError(
            f"table=3: is of one method's variants, here of {' and '.join(methods) or 'none'}; give table=1"
        )
    return wanted


def choose_against(wanted: str | None, paper_table: int, labels: Sequence[str]) -> str:
    """Returns the label of the row that the others are tested against."""
    if wanted is None:
        return next((label for label in REFERENCES[paper_table] if label in labels), REFERENCES[paper_table][0])
    if wanted not in labels:
        raise ValueError(f"against={wanted}: no such row; choose one of {', '.join(dict.fromkeys(labels))}")
    return wanted


def lower_is_better() -> dict[str, bool]:
    """Returns by metric whether lower is better, as `conf/metrics/` says."""
    files = [OmegaConf.load(file) for file in sorted((conf_folder() / "metrics").glob("*.yaml"))]
    metrics = [metric for file in files for metric in file.items() if metric[0] != "defaults"]  # which lists others
    return {name: options.get("lower_is_better", False) for name, options in metrics}


def write(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def file_name(dataset: str) -> str:
    """Returns a dataset's name as part of a file name."""
    return re.sub(r"[^\w.-]", "_", dataset)


if __name__ == "__main__":
    main()
