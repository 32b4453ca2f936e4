"""The script that draws the ablation, on logs whose scores are known."""

import sys
from pathlib import Path

import ablation_figures
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from dit4sr_pl.images.files import image_size, read_image
from dit4sr_pl.scores.pyiqa_loading import create
from dit4sr_pl.training.callbacks.validation_scores import validation_strip

CROPS = {name: torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(k)) for k, name in enumerate(("a", "b"))}


def write_run(folder: Path, restored_by_step: dict[int, str]) -> None:
    """Writes a log as `ValidationScores` does; at each step the restored image is `bicubic` or `truth`."""
    with SummaryWriter(folder) as writer:
        for step, restored in restored_by_step.items():
            for number, name in enumerate(ablation_figures.SHOWN):
                images = {"bicubic": CROPS["a"].roll(number, 1), "truth": CROPS["b"]}
                columns = images["bicubic"], images[restored], images["truth"]
                writer.add_image(f"val/{name}", validation_strip(images["bicubic"][:, ::4, ::4], *columns), step - 1)


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def call(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *words])
    ablation_figures.main()


def test_curves_are_ratios_to_bicubic_over_all_seeds(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "full/seed0", {100: "bicubic", 200: "truth"})
    write_run(tmp_path / "full/seed1", {100: "bicubic", 200: "bicubic"})
    write_run(tmp_path / "no_lr_injection/seed0", {100: "bicubic"})
    call(monkeypatch, str(tmp_path))
    photos, text, differences = map(cells, capsys.readouterr().out.strip().split("\n\n"))
    head, _, full, without = photos
    assert head == ["photos", "step 100", "step 200"] and text[0][0] == "text"
    assert full == ["FULL", "1.000 [1.000, 1.000]", "0.500 [0.000, 1.000]"]
    assert without == ["C: no_lr_injection", "1.000", ""]
    bicubic = torch.stack([CROPS["a"].roll(number, 1) for number in range(len(ablation_figures.SHOWN))])
    mean = create("stlpips")(bicubic, CROPS["b"].expand_as(bicubic)).mean().item()
    # One of the two seeds restored the truth, whose score is 0.
    assert float(differences[2][1].split()[0]) == pytest.approx(-mean / 2, abs=1e-3)
    assert differences[3][1] == "+0.0000 [0.0000, 0.0000]"
    assert image_size(tmp_path / "compare/curves.png")[0] > 1000
    assert read_image(tmp_path / "compare/crops.jpg").float().std() > 40


def test_a_folder_without_runs_is_named(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=f"{tmp_path}: no run with a validation; run `make ablation` first"):
        call(monkeypatch, str(tmp_path))
