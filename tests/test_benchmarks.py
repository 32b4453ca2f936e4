"""The benchmarks that count or measure for a GPU, at toy size."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import cached_latents, file_to_file, launches, overlap
from dit4sr_pl.cli.command import read_conf
from dit4sr_pl.model import DiT4SRTransformer, save_part
from dit4sr_pl.model.trained_part import base_of, part_of
from testing import ROOT
from testing.networks import randomise
from testing.student_files import STUDENTS, write_student
from testing.toy_runs import TOY_SD3

# A machine with little more than PyTorch lacks these.
MISSING = ("hydra", "omegaconf", "pyiqa", "imagecodecs", "stlpips_pytorch", "gradio", "spandrel", "bitsandbytes")
GPU_SECTIONS = [
    "environment",
    "forward",
    "training",
    "restoring",
    "lightning",
    "degrading",
    "autoencoder",
    "text",
    "kernels",
]


@pytest.mark.slow
def test_launches_are_counted_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launches.py", "--toy"])
    launches.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[4] for line in lines if line.startswith("waits per training step")] == ["1.0"]
    assert [line.split()[5] for line in lines if line.startswith("waits per step of euler")] == ["0.0"]
    rows = [line.split() for line in lines if "launches" in line]
    counts = [(row[0].rstrip(","), int(row[row.index("launches") - 1])) for row in rows]
    parts = ["encode", "forward", "backward", "update", "together"]
    assert [name for name, _ in counts] == ["evaluation", *parts, *parts]
    evaluation, checkpointed, kept = counts[0], dict(counts[1:6]), dict(counts[6:])
    assert evaluation[1] < kept["forward"]  # merged and without autocast
    assert checkpointed["backward"] - kept["backward"] == pytest.approx(kept["forward"], rel=0.1)


@pytest.mark.slow
def test_the_benchmark_of_gpus_runs_at_toy_size_where_little_is_installed(tmp_path):
    arguments = ["gpu.py", "--toy", "--device", "cpu", "--out", str(tmp_path), "--only", *GPU_SECTIONS]
    program = f"""
import runpy, sys
sys.modules |= dict.fromkeys({MISSING})
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
sys.argv = {arguments}
runpy.run_path({str(ROOT / "benchmarks" / "gpu.py")!r}, run_name="__main__")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    sections = json.loads((tmp_path / "results.json").read_text())["sections"]
    assert list(sections) == GPU_SECTIONS
    assert not [rows for rows in sections.values() if "error" in rows or "skipped" in rows]
    rows = [line.strip("| ").split(" | ") for line in run.stdout.splitlines() if line.startswith("| ")]
    assert {row[0] for row in rows[1:]} == set(GPU_SECTIONS)
    assert run.stdout.splitlines()[-1].startswith("| kernels")
    distances = {row[1]: float(row[2]) for row in rows if " against " in row[1]}
    assert len(distances) > 4
    assert max(distances.values()) < 1e-5


@pytest.mark.slow
def test_a_step_on_cached_latents_is_compared_with_one_that_encodes(monkeypatch, capsys):
    small = ["data.batch_size=2", "data.crop_size=64", f"model.backbone.name={TOY_SD3}", "trainer.precision=32-true"]
    monkeypatch.setattr(sys, "argv", ["cached_latents.py", "--repeats", "1", *small])
    cached_latents.main()
    told = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines() if line.startswith("|")]
    assert [(row[0], row[3]) for row in rows[2:]] == [("autoencoder", "2"), ("cached latents", "0")]
    assert "2 images of 64 pixels" in told and "cached latents / autoencoder: 0." in told


def test_the_benchmark_of_overlapping_compares_three_ways(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["overlap.py", "--images", "2", "--side", "32", "--network", "0"])
    overlap.main()
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row[:20].strip() for row in rows] == ["one after another", "written behind", "read ahead"]
    assert rows[0].endswith("1.00") and all(float(row.split()[-2]) > 0 for row in rows)


@pytest.fixture
def students(toy_backbone, tmp_path):
    """Overrides that take the toy backbone, and the files of a teacher and a student over it."""
    teacher = DiT4SRTransformer(toy_backbone.transformer)
    randomise(teacher.lr_stream)
    save_part(part_of(teacher, base_of(teacher, toy_backbone.name)), tmp_path / "teacher.safetensors")
    student = write_student(tmp_path, toy_backbone, STUDENTS["1 step"])
    overrides = [f"model.backbone.name={TOY_SD3}", "sampler.steps=2", "sampler.smallest=1"]
    return overrides, tmp_path / "teacher.safetensors", student


def table(text: str) -> dict[str, list[str]]:
    """Returns the rows of a Markdown table by their first cell."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in rows}


@pytest.mark.slow
def test_a_picture_is_timed_from_file_to_file_by_part(students, monkeypatch, capsys):
    overrides, teacher, student = students
    monkeypatch.setattr(file_to_file, "LR_SIDE", 16)
    checkpoints = ["--checkpoints", str(teacher), str(student), "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["file_to_file.py", *checkpoints, *overrides, "device=cpu"])
    file_to_file.main()
    rows = table(capsys.readouterr().out)
    assert rows["evaluations"] == ["2", "1"] and rows["caption"] == ["none", "none"]
    for column in (0, 1):
        parts = [float(rows[part][column]) for part in file_to_file.PARTS if part != "caption"]
        assert all(seconds > 0 for seconds in parts)
        assert sum(parts) == pytest.approx(float(rows["file to file"][column]), abs=1e-3)
    assert rows["file to file, to the first"][0] == rows["sampling, to the first"][0] == "1.00"


@pytest.mark.slow
def test_students_are_measured_next_to_their_teacher(students, monkeypatch, capsys):
    overrides, teacher, student = students
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from benchmarks import students as benchmark

    conf = lambda command, *given: read_conf(command, *given, *overrides)  # noqa: E731
    monkeypatch.setattr(benchmark, "read_conf", conf)
    monkeypatch.setattr(benchmark, "photos", lambda crops: [("a photo", torch.rand(crops, 3, 128, 128))])
    arguments = ["--teacher", str(teacher), "--students", str(student), "--crops", "1"]
    monkeypatch.setattr(sys, "argv", ["students.py", *arguments])
    benchmark.main()
    rows = table(capsys.readouterr().out)
    assert [cells[0] for cells in list(rows.values())[1:]] == ["2", "2", "2", "2", "2", "1"]
    whole = rows["teacher, 20 steps"]  # the overrides above leave two of them
    assert whole[2] == "1.000" and whole[6] == "1.00"
    own = rows[f"DiT4SR, 1 step ({student})"]
    assert own[1] != whole[1] and float(own[5]) > 0


@pytest.mark.slow
def test_a_teachers_trajectories_are_compared_with_their_solution(students, monkeypatch, capsys):
    overrides, teacher, _ = students
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from benchmarks import trajectories as benchmark

    monkeypatch.setattr(benchmark, "lr_images", lambda count: [torch.rand(1, 3, 64, 64)] * count)
    monkeypatch.setattr(benchmark, "ROWS", [("euler", 4, 1), ("dpm", 16, 1)])
    options = ["--teacher", str(teacher), "--photos", "1", "--exact", "16", overrides[0]]
    monkeypatch.setattr(sys, "argv", ["trajectories.py", *options])
    benchmark.main()
    rows = table(capsys.readouterr().out)
    assert [float(error) for error in rows["dpm"][2:]] == [0, 0, 0, 0]
    # One Euler step per window takes the teacher's own velocity; in the first window both begin with the noise.
    assert float(rows["euler"][2]) == pytest.approx(float(rows["the teacher's own"][2]), abs=1e-5)
    assert float(rows["euler"][5]) > 0 and float(rows["mean square"][5]) > 0
