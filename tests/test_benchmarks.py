"""The benchmarks that count or measure for a GPU, at toy size."""

import json
import subprocess
import sys

import pytest

from benchmarks import cached_latents, launches, overlap
from testing import ROOT
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
