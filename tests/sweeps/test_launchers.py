"""Launchers that cannot start a sweep say why in one line before a job runs."""

import subprocess
import sys

import pytest

from testing.commands import call

# Python raises ImportError for a module that is None here.
WITHOUT_LAUNCHERS = """
import runpy, sys, warnings
warnings.simplefilter("ignore")  # Hydra warns of plug-ins that it finds and cannot import
for name in ("joblib", "submitit", "hydra_plugins.hydra_joblib_launcher", "hydra_plugins.hydra_submitit_launcher"):
    sys.modules[name] = None
sys.argv[0] = "train"
runpy.run_module("dit4sr_pl.train", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["slurm", "local"])
def test_without_the_launchers_packages_one_line_names_the_extra(tmp_path, launcher):
    command = [sys.executable, "-c", WITHOUT_LAUNCHERS, "-m", "seed=0,1", f"hydra/launcher={launcher}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: hydra/launcher=slurm and hydra/launcher=local need packages")
    assert result.stderr.endswith("pip install 'dit4sr_pl[launchers]'\n")


@pytest.mark.slow
def test_without_the_launchers_packages_a_sweep_of_one_process_runs(tmp_path):
    for seed in range(2):
        folder = tmp_path / "outputs" / "default" / "full" / f"seed{seed}"
        folder.mkdir(parents=True)
        (folder / "finished.yaml").write_text("steps: 100000\n")
    command = [sys.executable, "-c", WITHOUT_LAUNCHERS, "-m", "seed=0,1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0 and result.stderr.count("finished at step 100000") == 2, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, named",
    [
        (["hydra.launcher.tasks_per_node=2"], "hydra.launcher.tasks_per_node=2 for a run with 1"),
        (["trainer.devices=1,2"], "hydra.launcher.tasks_per_node=1 for a run with 2"),
        (["hydra.launcher.nodes=2"], "hydra.launcher.nodes=2 for a run with 1"),
    ],
)
def test_jobs_of_another_number_of_processes_than_the_run_are_refused(tmp_path, arguments, named):
    message = call("dit4sr_pl.train", "-m", "hydra/launcher=slurm", "seed=9", *arguments, cwd=tmp_path)
    assert message.startswith("error: ") and named in message
    assert not (tmp_path / "outputs" / "default").exists()
