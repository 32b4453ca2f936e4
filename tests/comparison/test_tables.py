"""Tables from made-up results against slow clear loops, and from the paper's own numbers against a list by hand."""

import csv
import io
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.comparison import paper
from dit4sr_pl.comparison.dataset_table import make_dataset_table, rank
from dit4sr_pl.comparison.ranking import orders
from dit4sr_pl.comparison.rows import Run, make_rows, metrics_of
from dit4sr_pl.comparison.statistics import Resampling
from dit4sr_pl.comparison.tables import absent, csv_table, escaped, labels_of, latex, markdown
from testing.made_up_scores import draw_scores, made_up

LOWER = {"psnr": False, "ssim": False, "lpips": True, "musiq": False, "maniqa": False, "clipiqa": False, "liqe": False}
RESAMPLING = Resampling(0.95, 500, 0)

# Best and second best of the paper's Table 1, by eye
BEST = """
DrealSR psnr ResShift | Real-ESRGAN
DrealSR ssim Real-ESRGAN | SwinIR
DrealSR lpips StableSR | SwinIR
DrealSR musiq DiffBIR | SeeSR
DrealSR maniqa DiffBIR | DiT4SR
DrealSR clipiqa DiffBIR | DiT4SR
DrealSR liqe SeeSR | DiT4SR
RealSR psnr ResShift | SwinIR
RealSR ssim SwinIR | Real-ESRGAN
RealSR lpips SwinIR | Real-ESRGAN
RealSR musiq SeeSR | OSEDiff
RealSR maniqa DiT4SR | DiffBIR
RealSR clipiqa DiffBIR | SeeSR
RealSR liqe SeeSR | OSEDiff
RealLR200 musiq DiT4SR | OSEDiff
RealLR200 maniqa DiT4SR | DiffBIR
RealLR200 clipiqa DiT4SR | DiffBIR
RealLR200 liqe DiT4SR | OSEDiff
RealLQ250 musiq DiT4SR | SeeSR
RealLQ250 maniqa DiT4SR | DiffBIR
RealLQ250 clipiqa DiffBIR DiT4SR | SeeSR
RealLQ250 liqe DiT4SR | SeeSR
"""
METHODS = ["Real-ESRGAN", "SwinIR", "ResShift", "StableSR", "SeeSR", "DiffBIR", "OSEDiff"]
METHODS += ["SUPIR", "DreamClear", "SD3-ControlNet", "DiT4SR"]


def tables_of(paper_table, results, against="DiT4SR"):
    runs = [Run(Path(str(number)), result) for number, result in enumerate(results)]
    metrics = metrics_of(runs)
    return [
        make_dataset_table(
            dataset,
            rows,
            labels_of(paper_table, [(r.method, r.variant) for r in rows]),
            metrics,
            LOWER,
            RESAMPLING,
            against,
        )
        for dataset, rows in make_rows(runs, metrics).items()
    ]


def parsed(table: str) -> list[list[str]]:
    """Cells of a Markdown table's lines, but for the rule."""
    lines = [line for line in table.splitlines() if line.startswith("|") and not line.startswith("|--")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_papers_own_numbers_are_sorted_and_marked_as_in_the_paper():
    datasets = list(dict.fromkeys(row["dataset"] for row in paper.read("benchmarks")))
    results = []
    for dataset in datasets:
        for method in reversed(METHODS):
            scores = {metric: paper.number(dataset, method, "", metric) for metric in LOWER}
            results.append(made_up({"all": scores}, method, dataset=dataset))
    marked = []
    for table in tables_of(1, results):
        assert table.labels == METHODS
        for column, metric in enumerate(table.metrics):
            best, second = (
                " ".join(
                    label for label, ranks in zip(table.labels, table.ranks, strict=True) if ranks[column] == place
                )
                for place in (1, 2)
            )
            if best:
                marked.append(f"{table.dataset} {metric} {best} | {second}")
    assert sorted(marked) == sorted(BEST.split("\n")[1:-1])


def test_table_1_of_made_up_results_against_loops():
    metrics = ("psnr", "lpips", "own")
    methods = ["SeeSR", "Bicubic", "DiT4SR", "SwinIR"]
    results = [made_up(draw_scores(number, 9, metrics), method) for number, method in enumerate(methods)]
    results.append(made_up(draw_scores(9, 9, metrics), "DiT4SR", seed=1))
    expected = {}
    for metric in metrics:
        for method in methods:
            of_method = [result.scores for result in results if result.method == method]
            per_image = [statistics.fmean(scores[image][metric] for scores in of_method) for image in of_method[0]]
            expected[method, metric] = statistics.fmean(per_image)
    (table,) = tables_of(1, results)
    text = markdown(1, [table], "none", "DiT4SR", RESAMPLING)
    head, *rows = parsed(text)[:5]
    assert head == ["method", "images", "seeds", "psnr ↑", "lpips ↓", "own"]
    assert [row[0] for row in rows] == ["Bicubic", "SwinIR", "SeeSR", "DiT4SR"]
    assert [row[1:3] for row in rows] == [["9", "1"], ["9", "1"], ["9", "1"], ["9", "2"]]
    for row in rows:
        for metric, cell in zip(metrics, row[3:], strict=True):
            better = [expected[row[0], metric] - expected[other, metric] for other in methods if other != row[0]]
            ahead = sum(difference > 0 if metric == "lpips" else difference < 0 for difference in better)
            shown = f"{expected[row[0], metric]:.3f}"
            if metric != "own" and ahead < 2:
                shown = (f"**{shown}**", f"<u>{shown}</u>")[ahead]
            assert cell.split(" [")[0] == shown
    assert "own: nothing in conf/metrics/ says whether lower is better" in text

    tex = latex(1, [table], "none")
    for cell in (cell for row in rows for cell in row[3:]):
        number = re.sub(r"<u>(.*)</u>", r"\\underline{\1}", re.sub(r"\*\*(.*)\*\*", r"\\textbf{\1}", cell.split()[0]))
        assert f"& {number} {{\\scriptsize" in tex

    for record in csv.DictReader(io.StringIO(csv_table([table]))):
        assert float(record["mean"]) == pytest.approx(expected[record["method"], record["metric"]])
        assert float(record["low"]) < float(record["mean"]) < float(record["high"])
        assert (record["p"] == "") == (record["method"] == "DiT4SR") == (record["difference"] == "")


def test_rank_of_ties_and_of_numbers_that_are_missing():
    nan = math.nan
    means = np.array([[1.0004, nan, nan], [1.0001, 5, nan], [0.5, 7, 3], [0.5, 9, nan], [0.1, 9, nan]])
    expected = [[1, 0, 0], [1, 1, 0], [2, 2, 0], [2, 0, 0], [0, 0, 0]]
    assert rank(means, [False, True, False]).tolist() == expected
    assert rank(means[:, :1], [None]).tolist() == [[0]] * 5


VARIANTS = ["no_lr_injection", "full", "own", "no_lr_integration"]


def test_table_3_has_variants_in_the_papers_order_beside_its_numbers():
    metrics = ("musiq", "maniqa", "psnr")
    results = [made_up(draw_scores(n, 8, metrics), variant=v, dataset="reallq250") for n, v in enumerate(VARIANTS)]
    head, *rows = parsed(markdown(3, tables_of(3, results, "FULL"), "runs", "FULL", RESAMPLING))
    assert head[:6] == ["variant", "integration", "residual", "injection", "images", "seeds"]
    names = ["FULL", "FULL (paper)", "A: no_lr_integration", "A: no_lr_integration (paper)"]
    names += ["C: no_lr_injection", "C: no_lr_injection (paper)", "own"]
    assert [row[0] for row in rows[:7]] == names
    assert rows[3][1:] == ["no", "yes", "conv", "", "", "66.963", "0.574", ""]
    assert rows[6][1:4] == ["", "", ""]
    assert rows[7][0] == "difference to FULL" and [row[0] for row in rows[8:11]] == [names[2], names[4], "own"]
    assert [row[0] for row in rows[11:]] == [
        "by",
        *(f"the paper's {name} on RealLQ250" for name in metrics[:2]),
        *metrics,
    ]


def test_all_of_the_papers_rows_or_none():
    tables = tables_of(1, [made_up(draw_scores(0), variant="full"), made_up(draw_scores(1), "Bicubic")])
    everything = [row[0] for row in parsed(markdown(1, tables, "all", "DiT4SR", RESAMPLING))[1:]]
    assert everything == [
        "Bicubic",
        *(f"{name} (paper)" for name in METHODS[:-1]),
        "DiT4SR FULL",
        "DiT4SR FULL (paper)",
    ]
    assert "(paper)" not in markdown(1, tables, "none", "DiT4SR", RESAMPLING)
    assert [name for _, name in absent(3, tables[0])] == list(paper.VARIANTS)[1:]


def test_differences_are_of_common_images_and_the_others_are_named():
    scores = {variant: draw_scores(number, 8) for number, variant in enumerate(("full", "no_lr_residual"))}
    del scores["full"]["02"], scores["no_lr_residual"]["05"]
    (table,) = tables_of(3, [made_up(of, variant=variant) for variant, of in scores.items()], "FULL")
    (pair,) = table.paired.values()
    common = [image for image in draw_scores(0, 8) if image not in ("02", "05")]
    for column, metric in enumerate(("psnr", "ssim")):
        differences = [scores["no_lr_residual"][image][metric] - scores["full"][image][metric] for image in common]
        assert pair.difference[column] == pytest.approx(statistics.fmean(differences))
        assert pair.low[column] < pair.difference[column] < pair.high[column]
    less, more = sorted(pair.p)
    assert sorted(pair.p_holm) == pytest.approx([min(1, 2 * less), min(1, max(more, 2 * less))])
    text = markdown(3, [table], "none", "FULL", RESAMPLING)
    assert "- B: no_lr_residual: tested without images that one of the two lacks: 02, 05." in text


def test_what_was_not_measured_is_an_empty_cell():
    scores = draw_scores(0)
    scores["03"]["ssim"] = math.nan
    (table,) = tables_of(1, [made_up(scores), made_up(draw_scores(1), "Bicubic")])
    rows = parsed(markdown(1, [table], "none", "DiT4SR", RESAMPLING))
    assert rows[2][0] == "DiT4SR" and rows[2][4] == ""
    assert rows[4][0] == "Bicubic" and rows[4][3] == "" and "p=" in rows[4][2]
    assert {r["mean"] == "" for r in csv.DictReader(io.StringIO(csv_table([table]))) if r["metric"] == "ssim"} == {
        True,
        False,
    }


def test_notes_name_seeds_images_and_versions():
    scores = draw_scores(0)
    del scores["04"]
    results = [made_up(scores, versions={"pyiqa": "0.1.14"}), made_up(draw_scores(1), seed=1)]
    text = markdown(1, tables_of(1, results), "none", "DiT4SR", RESAMPLING)
    assert "- DiT4SR: left out, not scored with every seed: 04." in text
    assert "- Scored with pyiqa 0.1.14 and none" in text
    assert "No tests: DiT4SR and another row must be there" in text


def test_latex_is_escaped_and_every_line_has_all_columns():
    names = [r"a_b & 100% #1 {x} ~ ^ \ $", "[0] < 1"]
    results = [made_up(draw_scores(number), name) for number, name in enumerate(names)]
    tex = latex(1, tables_of(1, results), "all")
    assert escaped(names[0]) == (r"a\_b \& 100\% \#1 \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{} \$")
    assert f"\n{escaped(names[0])} & 6 & 1 & " in tex and "\n{[}0] $<$ 1 & 6" in tex
    lines = tex.splitlines()
    body = [line for line in lines if re.search(r"(?<!\\)&", line)]
    assert len(body) == 1 + 2 + 11
    assert all(len(re.findall(r"(?<!\\)&", line)) == 4 and line.endswith(r"\\") for line in body)
    assert lines[0] == r"\begin{tabular}{lllcc}" and lines[-1] == r"\end{tabular}"
    bare = re.sub(r"\\[{}]", "", tex)
    assert bare.count("{") == bare.count("}")


def test_paper_package_agrees_with_the_ablations_and_with_itself():
    assert set(paper.VARIANTS) == {file.stem for file in (conf_folder() / "ablation").glob("*.yaml")}
    assert [row["variant"] for row in paper.read("ablation")] == ["FULL", "A", "B", "C", "D"]
    assert paper.methods() == METHODS and paper.spelling("drealsr") == "DrealSR" and paper.spelling("own") == "own"
    assert paper.number("reallq250", "DiT4SR", "full", "musiq") == paper.number("RealLQ250", "DiT4SR", "", "musiq")
    assert math.isnan(paper.number("realsr", "Bicubic", "", "psnr"))


def test_the_order_of_the_variants_beside_the_papers():
    letters = {"full": 0.4, "linear_lr_injection": 0.3, "no_lr_injection": 0.2, "no_lr_residual": 0.1}
    results = [
        made_up({"x": {"lpips": 1 - value * sign, "psnr": value}}, variant=variant, seed=seed)
        for variant, value in (letters | {"no_lr_integration": 0.0}).items()
        for seed, sign in enumerate((1, 1, -0.5))
    ]
    (table,) = tables_of(3, [*results, made_up({"x": {"lpips": 0.0, "psnr": 9.0}}, "SD3-ControlNet")], against="FULL")
    musiq, maniqa, lpips, psnr = orders(table)
    assert musiq[:2] == ["the paper's musiq on RealLQ250", "FULL 71.832, D 71.607, C 71.202, B 70.887, A 66.963"]
    assert maniqa[1] == "FULL 0.632, D 0.621, B 0.614, C 0.610, A 0.574"
    assert lpips == ["lpips", "FULL 0.800, D 0.850, C 0.900, B 0.950, A 1.000", *LPIPS_TAUS]
    assert psnr == ["psnr", "FULL 0.400, D 0.300, C 0.200, B 0.100, A 0.000", *PSNR_TAUS]
    assert "SD3-ControlNet" in (text := markdown(3, [table], "runs", "FULL", RESAMPLING)) and psnr[1] in text
    assert not orders(tables_of(3, results[:6], against="FULL")[0])


# One pair of ten is the other way round by MANIQA; in the third seed lpips turns all of them round.
LPIPS_TAUS = ["+1.0 (+1.0, +1.0, -1.0)", "+0.8 (+0.8, +0.8, -0.8)"]
PSNR_TAUS = ["+1.0 (+1.0, +1.0, +1.0)", "+0.8 (+0.8, +0.8, +0.8)"]
