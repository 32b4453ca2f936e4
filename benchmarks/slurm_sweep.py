"""Measures what a stop costs: a sweep of the five variants on a SLURM of this machine, with every job stopped once.

    python benchmarks/slurm_sweep.py [--stop COMMAND]

It needs root, Debian's slurm-wlm and munge. The losses must equal those of an undisturbed sweep. A stop costs the time
between the steps before and after it, minus that between other steps and minus the time that the job waited for another
job to end. What remains is the checkpoint, SLURM's delay before it starts a job again, Python's imports, and loading.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import torch

from dit4sr_pl.common.randomness import generator
from dit4sr_pl.images.files import write_image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from testing.slurm_cluster import ask, cluster  # noqa: E402
from testing.toy_runs import events, small  # noqa: E402

VARIANTS = ["full", "no_lr_integration", "no_lr_residual", "no_lr_injection", "linear_lr_injection"]
STEPS, STOPPED_AT = 8, 3


def main() -> None:
    """Runs both sweeps and the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stop", default="scancel --signal=USR2 $JOB", help="default: SLURM's own signal")
    command = parser.parse_args().stop
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder) / "cluster") as environment:
        folder = Path(folder)
        for i in range(5):
            write_image(folder / "photos" / f"{i}.png", torch.rand(3, 80, 80, generator=generator("cpu", i)))
        commands = f"commands: {{0: '{command}'}}, seed: 0, step: {STOPPED_AT}, wait: 60"
        once = f"+callbacks.monitor={{_target_: testing.slurm_cluster.Once, {commands}}}"
        slurm = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=null"]
        whole = sweep(folder, environment, "whole")
        stopped = sweep(folder, environment, "stopped", *slurm, once)
        print(f"5 jobs, one after another: {whole:.0f} s; on SLURM, two at a time, each stopped: {stopped:.0f} s")
        report(folder, environment)


def sweep(folder: Path, environment: dict[str, str], name: str, *options: str) -> float:
    """Runs a sweep and returns its seconds."""
    steps = [f"trainer.max_steps={STEPS}", f"trainer.val_check_interval={STEPS}", "metrics=[psnr]"]
    losses = ["+callbacks.losses._target_=dit4sr_pl.training.callbacks.Losses", "+callbacks.losses.folder=${output}"]
    arguments = [f"+ablation={','.join(VARIANTS)}", f"hydra.sweep.dir={name}", *small(folder / "photos"), *steps]
    paths = {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "dit4sr_pl.train", "-m", *arguments, *losses, *options]
    start = time.monotonic()
    subprocess.run(command, cwd=folder, env={**environment, **paths}, check=True)
    return time.monotonic() - start


def report(folder: Path, environment: dict[str, str]) -> None:
    """Compares the losses of the sweeps and prints what each stop cost."""
    lost = []
    for number, variant in enumerate(VARIANTS):
        run = folder / "stopped" / "default" / variant / "seed0"
        whole = folder / "whole" / "default" / variant / "seed0"
        assert (run / "losses.csv").read_text() == (whole / "losses.csv").read_text(), variant
        stops = (run / "train.log").read_text().count("resuming from step")
        assert stops == 1, variant
        times = [event.wall_time for event in events(run).Scalars("train/loss")]
        gaps = sorted(after - before for before, after in zip(times, times[1:], strict=False))
        waited = waiting_time(environment, f"1_{number}")
        lost.append(gaps[-1] - statistics.median(gaps) - waited)
        print(f"{variant}: {lost[-1]:.1f} s lost, and {waited:.0f} s in the queue behind others; losses equal")
    print(f"lost per stop: {statistics.mean(lost):.1f} s, at most {max(lost):.1f} s")


def waiting_time(environment: dict[str, str], job: str) -> float:
    """Returns the seconds that a job waited for a busy node after it could run again."""
    shown = dict(pair.split("=", 1) for pair in ask(environment, "scontrol", "show", "job", job).split() if "=" in pair)
    began, could = (datetime.fromisoformat(shown[name]) for name in ("StartTime", "EligibleTime"))
    return (began - could).total_seconds()


if __name__ == "__main__":
    main()
