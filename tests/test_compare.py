"""The command as typed."""

from pathlib import Path

import pytest
from PIL import Image

from dit4sr_pl.compare import choose_against, choose_table, split
from dit4sr_pl.comparison.rows import Run
from testing.commands import call, run
from testing.made_up_scores import draw_scores, made_up, write_run

VARIANTS = ("full", "no_lr_residual")


def test_paths_and_keys_are_told_apart():
    keys = ["output=x", "strip.images=[a, b]", "+hydra.verbose=true", "~strip.at", "table=1", "runs=[x]"]
    paths = ["outputs/a", "./output=x", "outputs/lr=0.1,seed=3", "a b/*", "stripes=2", "output", "${x}", "it's"]
    options = ["--cfg", "job", "--help", "-c=job"]
    assert split([*paths, *options, *keys]) == (paths, [*options, *keys])


@pytest.fixture
def outputs(tmp_path):
    for variant in VARIANTS:
        for seed in range(2):
            scores = draw_scores(VARIANTS.index(variant) * 2 + seed, metrics=("psnr", "stlpips"))
            result = made_up(scores, variant=variant, seed=seed, pictures="images")
            write_run(tmp_path / f"outputs/lr=0.1, a b/{variant}/seed{seed}", result)
    return tmp_path


FULL, OTHER = "outputs/lr=0.1, a b/full", "outputs/lr=0.1, a b/no_lr_residual"


OPTIONS = ["output=to", "resampling.resamples=200", "strip.crop=16"]


@pytest.mark.slow
def test_the_command_needs_no_pytorch(outputs):
    (outputs / "torch.py").write_text("raise SystemExit('PyTorch was imported')")
    result = run("dit4sr_pl.compare", "outputs", *OPTIONS, cwd=outputs)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert (outputs / "to/table3.md").read_text() in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("paths", [["outputs"], [f"{FULL}/seed0", f"{FULL}/*1", f"runs=['{OTHER}']"]])
def test_the_command_writes_and_prints_everything(outputs, paths, capsys):
    assert call("dit4sr_pl.compare", *paths, *OPTIONS, cwd=outputs) is None
    printed = capsys.readouterr().out
    names = ["chart_RealSR.pdf", "chart_RealSR.png", "strip_RealSR.png", "table3.csv", "table3.md", "table3.tex"]
    assert sorted(path.name for path in (outputs / "to").iterdir()) == names
    assert (outputs / "to/table3.md").read_text() in printed
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert any(line.startswith("| FULL | yes | yes | conv | 6 | 2 | ") for line in lines)
    assert any(line.startswith("| B: no_lr_residual | 6 | ") and line.count("p=") == 2 for line in lines)


@pytest.mark.slow
def test_the_tables_are_written_before_they_are_printed(outputs, monkeypatch):
    def closed(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("builtins.print", closed)
    assert "Broken pipe" in call("dit4sr_pl.compare", "outputs", *OPTIONS, cwd=outputs)
    assert {"table3.csv", "table3.md", "table3.tex"} <= {path.name for path in (outputs / "to").iterdir()}


@pytest.mark.slow
def test_the_tables_are_there_even_if_a_strip_cannot_be_made(outputs):
    Image.new("RGB", (9, 9)).save(outputs / OTHER / "seed0/images/01.png")
    message = call("dit4sr_pl.compare", "outputs", "resampling.resamples=100", cwd=outputs)
    assert "seed0/images/01.png: 9x9 but 40x40 in" in message and "\n" not in message
    assert {"table3.md", "chart_RealSR.png"} <= {path.name for path in (outputs / "outputs/compare").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["outputs", FULL], "named twice, by outputs and by"),
        (["outputs", "ouput=x"], "ouput=x: no such file or folder"),
        (["outputs", "table=1", "against=A"], "against=A: no such row; choose one of DiT4SR FULL, DiT4SR B: no_lr"),
        (["outputs", "strip.images=0"], "strip.images=0"),
        (["outputs", "strip.hr=nowhere"], "strip.hr=nowhere: no such file"),
    ],
)
def test_a_mistake_gets_one_line(outputs, arguments, message):
    answer = call("dit4sr_pl.compare", *arguments, cwd=outputs)
    assert message in answer and "\n" not in answer


def runs(*keys: tuple[str, str]) -> list[Run]:
    return [Run(Path(str(n)), made_up(draw_scores(n), method, variant)) for n, (method, variant) in enumerate(keys)]


def test_the_table_follows_from_the_runs():
    variants, methods = runs(("DiT4SR", "full"), ("DiT4SR", "own")), runs(("DiT4SR", "full"), ("Bicubic", ""))
    two = runs(("DiT4SR", "full"), ("Other", "full"))
    assert [choose_table("auto", of) for of in (variants, [*variants, methods[1]], variants[:1])] == [3, 3, 1]
    assert [choose_table("auto", of) for of in (methods, two)] == [1, 1]
    assert choose_table(1, variants) == 1 and choose_table(3, variants[:1]) == 3
    for several in (two, methods[1:]):
        with pytest.raises(ValueError, match="table=3: .* of (DiT4SR and Other|none); give table=1"):
            choose_table(3, several)


def test_the_row_to_test_against():
    assert choose_against(None, 3, ["A: x", "FULL"]) == "FULL"
    assert choose_against(None, 1, ["Bicubic", "DiT4SR FULL"]) == "DiT4SR FULL"
    assert choose_against(None, 1, ["Bicubic"]) == "DiT4SR"
    assert choose_against("Bicubic", 1, ["Bicubic"]) == "Bicubic"
