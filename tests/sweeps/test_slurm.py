"""Jobs of sweeps on a real SLURM of this machine, stopped in every way that it has, equal undisturbed runs."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.model import load_part
from dit4sr_pl.train import train
from dit4sr_pl.training.run_folder import checkpoints_in
from testing import ROOT
from testing.slurm_cluster import MISSING, ask, cluster
from testing.toy_runs import events, small

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}: needs Debian's slurm-wlm and munge"),
    pytest.mark.skipif(os.geteuid() != 0, reason="a SLURM of one's own runs as root"),
]

# The command that a job runs before its third step, by the seed of its run
STOPS = {
    0: "scontrol requeue $JOB",  # SLURM sends SIGTERM, and queues the job itself
    1: "scancel --signal=TERM $JOB",  # a node that shuts down sends it too
    2: "scancel --signal=USR2 $JOB",  # SLURM sends it before the time limit; submitit queues the job
    3: "sbatch --partition=high --ntasks=2 --output=/dev/null --wrap=true",  # this job takes the whole node
    4: "kill -9 $PPID",  # this kills the training
}
COMES_BACK, KILLED, REFUSED = (0, 1, 2, 3), 4, 5
STEPS = 5
LOSSES = ["+callbacks.losses._target_=dit4sr_pl.training.callbacks.Losses", "+callbacks.losses.folder=${output}"]
ONCE = "+callbacks.monitor={_target_: testing.slurm_cluster.Once, commands: {%s}, seed: ${seed}, step: 2, wait: 30}"


def options(photos: Path) -> list[str]:
    commands = ", ".join(f"{seed}: '{command}'" for seed, command in STOPS.items())
    steps = [f"trainer.max_steps={STEPS}", f"trainer.val_check_interval={STEPS}"]
    never = ["callbacks.checkpoint.every_n_train_steps=null", "metrics=[psnr]"]  # except on SLURM's signals
    return [*small(photos), *LOSSES, *steps, *never, ONCE % commands]


class Cluster:
    """A cluster and the folder that sweeps are started in."""

    def __init__(self, folder: Path, photos: Path, environment: dict[str, str]):
        self.folder, self.photos = folder, photos
        places = [ROOT, ROOT / "src"]
        self.environment = {**environment, "PYTHONPATH": os.pathsep.join(map(str, places))}
        self.environment.pop("HYDRA_FULL_ERROR", None)  # a command called in this process sets it

    def sweep(self, *arguments: str) -> subprocess.CompletedProcess:
        # With a limit under ten minutes submitit takes every signal for a timeout
        launcher = ["cpus_per_task=1", "mem_gb=null", "timeout_min=9"]
        command = ["-m", "hydra/launcher=slurm", *(f"hydra.launcher.{option}" for option in launcher)]
        return self.run(sys.executable, "-m", "dit4sr_pl.train", *command, *options(self.photos), *arguments)

    def run(self, *command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=900
        )

    def seed(self, number: int) -> Path:
        return self.folder / "outputs" / "default" / "full" / f"seed{number}"


@pytest.fixture(scope="module")
def slurm(photos, tmp_path_factory) -> Cluster:
    folder = tmp_path_factory.mktemp("slurm")
    with cluster(folder / "cluster") as environment:
        yield Cluster(folder, photos, environment)


@pytest.fixture(scope="module")
def undisturbed(photos, tmp_path_factory) -> Callable[[int], Path]:
    """Returns a function that gives the folder of an undisturbed run by its seed."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def run(seed: int) -> Path:
        output = folder / str(seed)
        if not output.exists():
            with initialize_config_dir(str(conf_folder()), version_base="1.3"):
                train(compose("train", [*options(photos), "~callbacks.monitor", f"seed={seed}", f"output={output}"]))
        return output

    return run


@pytest.fixture(scope="module")
def stopped(slurm) -> subprocess.CompletedProcess:
    """Returns a sweep of six jobs: SLURM stops four, one is killed, one is refused since its folder holds another run.
    Next to the first lies a checkpoint as Lightning writes it on SLURM, which Lightning would prefer."""
    other = slurm.seed(REFUSED)
    (other / "checkpoints").mkdir(parents=True)
    (other / "checkpoints" / "0000001.ckpt").touch()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        OmegaConf.save(compose("train", ["optimizer.lr=1", "output=x", f"seed={REFUSED}"]), other / "config.yaml")
    for stale in (slurm.seed(0), slurm.seed(0) / "checkpoints", slurm.folder):
        stale.mkdir(parents=True, exist_ok=True)
        (stale / "hpc_ckpt_1.ckpt").write_bytes(b"of another job")
    return slurm.sweep(f"seed={','.join(map(str, [*STOPS, REFUSED]))}")


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert (ours / "losses.csv").read_text() == (theirs / "losses.csv").read_text()
    ours, theirs = (load_part(folder / "lr_stream.safetensors").state for folder in (ours, theirs))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("seed", COMES_BACK)
def test_a_job_that_slurm_stops_saves_and_comes_back_to_what_an_undisturbed_run_gives(
    slurm, stopped, undisturbed, seed
):
    """The job does not return to epoch 0, to the first photos or to the weights of another job."""
    assert (slurm.seed(seed) / "finished.yaml").exists(), stopped.stderr
    log = (slurm.seed(seed) / "train.log").read_text()
    assert "resuming from step 3" in log, log
    assert_same_run(slurm.seed(seed), undisturbed(seed))


def test_jobs_that_fail_keep_none_from_running_and_get_a_line_each(slurm, stopped):
    assert stopped.returncode == 1
    submitted, killed, refused = stopped.stderr.splitlines()
    assert submitted.startswith("6 jobs submitted; they also run without this command. Logs: ")
    assert killed.startswith(f"error: seed={KILLED}: SLURM's job ") and "left no result" in killed
    assert refused.startswith(f"error: seed={REFUSED}: {slurm.seed(REFUSED)} holds a run with other settings: ")
    assert not (slurm.seed(KILLED) / "finished.yaml").exists() and not checkpoints_in(slurm.seed(KILLED))


def test_the_verdict_of_slurm_is_that_of_the_job(slurm, stopped):
    states = ask(slurm.environment, "squeue", "--states=all", "--array", "--noheader", "--format=%K %T", "--me")
    by_job = dict(line.split() for line in states.splitlines() if line.split()[0] != "N/A")
    assert [by_job[str(seed)] for seed in range(6)] == ["COMPLETED"] * 4 + ["FAILED"] * 2


def test_outputs_are_one_experiment(slurm, stopped):
    """There is no folder of a rank, of a start or of Lightning's."""
    outputs = slurm.folder / "outputs"
    assert {path.name for path in outputs.iterdir()} == {".slurm", "multirun.yaml", "default"}
    assert sorted(path.name for path in (outputs / "default" / "full").iterdir()) == [f"seed{i}" for i in range(6)]
    assert len(list(outputs.rglob("hpc_ckpt*"))) == 2
    for seed in COMES_BACK:
        steps = [event.step for event in events(slurm.seed(seed)).Scalars("train/loss")]
        assert steps == list(range(STEPS))
    result = slurm.run(sys.executable, "-m", "dit4sr_pl.compare", "outputs")
    assert result.returncode == 0 and "FULL" in result.stdout, result.stderr


def test_the_same_command_goes_on_with_what_was_killed(slurm, stopped, undisturbed):
    again = slurm.sweep(f"seed={KILLED}", "~callbacks.monitor")
    assert again.returncode == 0, again.stderr
    assert_same_run(slurm.seed(KILLED), undisturbed(KILLED))


def test_two_processes_of_a_job_are_one_run_and_come_back_together(slurm, undisturbed):
    devices = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=1"]
    result = slurm.sweep("seed=2", *devices, "hydra.sweep.dir=two")
    assert result.returncode == 0, result.stderr
    folder, alone = slurm.folder / "two" / "default" / "full" / "seed2", undisturbed(2)
    assert [path.name for path in folder.parent.iterdir()] == ["seed2"]
    log = (folder / "train.log").read_text()
    assert log.count("SIGUSR2 at step 3") == log.count("resuming from step 3") == 1, log
    assert len(list(folder.glob("events.*"))) == 2  # one per start
    ours, theirs = ((path / "losses.csv").read_text().split()[1:] for path in (folder, alone))
    for our, their in zip(ours, theirs, strict=True):
        assert float(our.split(",")[1]) == pytest.approx(float(their.split(",")[1]), rel=1e-4)


def test_a_mistake_that_sbatch_finds_is_shown_in_one_line(slurm):
    result = slurm.sweep("seed=9", "hydra.launcher.partition=nowhere")
    *sbatch, said = result.stderr.splitlines()
    assert result.returncode == 1 and said.startswith("error: not submitted: "), result.stderr
    assert "sbatch: error: invalid partition specified: nowhere" in said
    assert all(line.startswith("sbatch: ") for line in sbatch)  # submitit shows sbatch's own output
    assert not slurm.seed(9).exists()


def test_processes_that_are_not_one_run_are_refused(slurm):
    """Otherwise two trainings would write into one folder, and SLURM would report success."""
    command = [sys.executable, "-m", "dit4sr_pl.train", "output=twice"]
    result = slurm.run("srun", "--ntasks=2", *command)
    left = {path.name for path in (slurm.folder / "twice").glob("*")}
    assert result.returncode == 1 and left <= {"hydra"}  # which Hydra writes before the command checks anything
    assert result.stderr.count("error: SLURM started 2 processes for trainer.devices=1") == 2


def test_every_knob_reaches_sbatch(slurm, stopped):
    scripts = [path.read_text() for path in (slurm.folder / "outputs" / ".slurm").rglob("*submission.sh")]
    (script,) = (script for script in scripts if "--array" in script)
    for line in ("--array=0-5%6", "--ntasks-per-node=1", "--signal=USR2@120", "--time=9", "--requeue", "--nodes=1"):
        assert f"#SBATCH {line}\n" in script
    assert "export OMP_NUM_THREADS=1\n" in script and "--kill-on-bad-exit=1 --cpus-per-task=1" in script
