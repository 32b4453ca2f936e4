"""The notebooks: they define nothing, keep nothing, and run from their first cell to their last."""

import ast
import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

matplotlib.use("Agg")
FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def cells(name: str) -> list[dict]:
    return json.loads((FOLDER / name).read_text())["cells"]


def code(name: str) -> list[str]:
    return ["".join(cell["source"]) for cell in cells(name) if cell["cell_type"] == "code"]


@pytest.fixture
def outputs(tmp_path, monkeypatch) -> Path:
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    yield tmp_path / "outputs"
    plt.close("all")


def run_notebook(name: str) -> dict:
    """Its variables after the last cell, with the figures that it leaves drawn and open."""
    plt.close("all")
    variables: dict = {}
    for number, source in enumerate(code(name)):
        exec(compile(source, f"{name}, cell {number}", "exec"), variables)
    for figure in map(plt.figure, plt.get_fignums()):
        figure.canvas.draw()
        # Of the panels of a grid the last may be left over
        drawn = [bool(axis.images or axis.lines or axis.patches) for axis in figure.axes]
        assert sum(drawn) >= len(drawn) - 1, name
    return variables


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_defines_nothing_and_keeps_no_outputs(name):
    nodes = [node for source in code(name) for node in ast.walk(ast.parse(source))]
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not [node for node in nodes if isinstance(node, definitions)]
    assert not [cell for cell in cells(name) if cell.get("outputs") or cell.get("execution_count")]
    assert (FOLDER / name).stat().st_size < 2**20


@pytest.mark.slow
def test_degradation(outputs):
    variables = run_notebook("01_degradation.ipynb")
    assert len(plt.get_fignums()) == 2 and len(variables["stages"]) == 14  # all that can be drawn, was
    titles = [axis.get_title() for axis in plt.figure(1).axes]
    assert titles[:2] == ["photo, 512x512", "crop, 256x256"] and "lr, 64x64" in titles


@pytest.mark.slow
def test_streams_of_the_shipped_network_where_there_are_no_runs(outputs, capsys):
    variables = run_notebook("02_streams.ipynb")
    assert "tiny-dit4sr, and the same with LR Residual switched off" in capsys.readouterr().out
    on, off = variables["nets"].values()
    assert on.variant.lr_residual and not off.variant.lr_residual
    first, second = variables["records"].values()
    assert not first[7].attn["noise", "lr"].equal(second[7].attn["noise", "lr"])
    titles = [axis.get_title() for axis in plt.figure(1).axes]
    assert titles == ["X → X", "X → L", "L → X", "L → L"] * 2 and len(plt.get_fignums()) == 4


@pytest.mark.slow
def test_runs_side_by_side(outputs, run, capsys):
    for variant in ("full", "no_lr_residual"):
        # The notebook of the streams reads runs over its own backbone, tiny-sd3.
        overrides = [f"+ablation={variant}", "metrics=[psnr]", "model.backbone.name=tiny-sd3"]
        run(f"outputs/ablation/{variant}/seed0", *overrides)
    run_notebook("03_ablation.ipynb")
    printed = capsys.readouterr().out
    assert "FULL" in printed and "B: no_lr_residual" in printed and "psnr" in printed
    made = {path.name for path in (outputs / "ablation" / "compare").iterdir()}
    assert {"table3.md", "strip_validation.png", "chart_validation.png", "lr", "hr"} <= made
    assert len(plt.get_fignums()) == 3 and len(plt.figure(3).axes[1].lines) == 2

    run_notebook("02_streams.ipynb")
    assert "outputs/ablation/no_lr_residual/seed0/lr_stream.safetensors" in capsys.readouterr().out
