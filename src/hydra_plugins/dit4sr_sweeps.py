"""Sweeps in which a failed job does not stop the others, on this machine and on SLURM.

Hydra finds this file by the name of its folder and imports it when any command starts, so it imports neither PyTorch
nor submitit. The launchers' packages are the extra `launchers`; everything but the launchers works without them.
"""

import atexit
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher

if TYPE_CHECKING:
    from submitit import AutoExecutor, SlurmJob


class MissingLauncher(Launcher):
    """The stand-in for a launcher whose package is not installed."""

    def __init__(self, **params: Any):
        raise ValueError(
            "hydra/launcher=slurm and hydra/launcher=local need packages that are not installed; "
            "pip install 'dit4sr_pl[launchers]'"
        )

    setup = launch = None  # Hydra makes no object of a class without them


try:
    from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
except ImportError:
    JoblibLauncher = MissingLauncher
try:
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
except ImportError:
    SlurmLauncher = MissingLauncher

STOPPED = 128 + signal.SIGTERM
WITHOUT_PREFIX = ("timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name")
WITHOUT_PREFIX += ("stderr_to_stdout",)  # submitit's parameters of any cluster; SLURM's own begin with `slurm_`


class FaultTolerantSweeper(BasicSweeper):
    """The sweeper that runs every job, also after one has failed, and ends with a line for each failed job."""

    def sweep(self, arguments: list[str]) -> Any:
        """Runs the jobs and returns their results; exits with code 1 if one failed."""
        launcher, failures = self.launcher, []

        def launch(batch: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
            results = launcher.launch(batch, initial_job_idx=initial_job_idx)
            for overrides, result in zip(batch, results, strict=True):
                if result.status == JobStatus.FAILED:
                    swept = [override for override in overrides if not all(override in other for other in batch)]
                    failures.append(f"error: {' '.join(swept or overrides)}: {result._return_value}")
            return [result for result in results if result.status == JobStatus.COMPLETED]

        self.launcher = SimpleNamespace(launch=launch)
        results = super().sweep(arguments)
        if failures:
            sys.exit("\n".join(failures))
        return results


class Local(JoblibLauncher):
    """The launcher that runs jobs side by side on this machine."""


class Slurm(SlurmLauncher):
    """submitit's launcher, with jobs that SLURM requeues however it stops them and that exit with their own code.

    SLURM kills all processes of a job when one fails. The command waits until every job has a result or has left the
    queue; the jobs also run without it.
    """

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Submits the jobs as one array, waits for them and returns their results."""
        self.check(job_overrides)
        state = Singleton.get_state()
        jobs = [(list(job), "hydra.sweep.dir", i, "", state) for i, job in enumerate(job_overrides, initial_job_idx)]
        try:
            submitted = self.executor().map_array(self, *zip(*jobs, strict=True))
        except RuntimeError as error:  # submitit raises it for sbatch's errors and where srun is missing
            raise ValueError(f"not submitted: {error}") from None
        logs = submitted[0].paths.folder.parent
        print(f"{len(jobs)} jobs submitted; they also run without this command. Logs: {logs}", file=sys.stderr)
        return wait_for(submitted)

    def check(self, job_overrides: Sequence[Sequence[str]]) -> None:
        """Raises ValueError for a job that would not get one process per device; Lightning would train several runs."""
        for job in job_overrides:
            trainer = self.hydra_context.config_loader.load_sweep_config(self.config, list(job)).trainer
            asked = {"tasks_per_node": trainer.devices, "nodes": trainer.num_nodes}
            for key, value in asked.items():
                if self.params[key] != value:
                    raise ValueError(
                        f"hydra.launcher.{key}={self.params[key]} for a run with {value}; it must be a number, equal "
                        "to that of the trainer and the same for all jobs of a sweep"
                    )

    def executor(self) -> "AutoExecutor":
        """Returns submitit's executor with the launcher's parameters."""
        from submitit import AutoExecutor

        given = {key: value for key, value in self.params.items() if value is not None}
        folder, timeouts = given.pop("submitit_folder"), given.pop("max_num_timeout")
        given["srun_args"] = ["--kill-on-bad-exit=1"]  # otherwise the others wait for a dead process
        if cpus := given.get("cpus_per_task"):
            given["srun_args"] += [f"--cpus-per-task={cpus}"]  # since SLURM 22.05 srun does not inherit it
            given["setup"] = [f"export OMP_NUM_THREADS={cpus}", *given.get("setup", [])]
        executor = AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=timeouts)
        executor.update_parameters(**{key if key in WITHOUT_PREFIX else f"slurm_{key}": given[key] for key in given})
        return executor

    def __call__(self, *job: Any) -> JobReturn:
        """Runs the job; every process of the job calls this."""
        signal.signal(signal.SIGTERM, stop)  # submitit ignores SIGTERM; the training replaces this handler
        try:
            result = super().__call__(*job)
        except SystemExit as end:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a requeue sends it again
            if end.code == STOPPED:
                requeue()
            raise
        if result.status == JobStatus.FAILED:
            atexit.register(os._exit, 1)  # after submitit has written the result
        return result


def stop(signum: int, frame: FrameType | None) -> None:
    """Ends a job outside of a training; the first process's exit code has it requeued."""
    sys.exit(STOPPED if os.environ["SLURM_PROCID"] == "0" else 0)


def requeue() -> None:
    """Requeues a stopped job that SLURM still counts as running.

    Such a job got a signal by itself, is on a node that shuts down, or is in the grace time of a preemption. In other
    states SLURM has cancelled it, or requeued it already.
    """
    from submitit import JobEnvironment

    job = JobEnvironment().job_id  # in the form ARRAY_TASK; SLURM_JOB_ID may name the whole array
    squeue = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    if subprocess.run(squeue, capture_output=True, text=True).stdout.strip() == "RUNNING":
        subprocess.run(["scontrol", "requeue", job])


def wait_for(jobs: "Sequence[SlurmJob]") -> list[JobReturn]:
    """Waits until all jobs have a result or have left the queue, and returns their results."""
    started, missed = time.monotonic(), dict.fromkeys((job.job_id for job in jobs), 0)
    while waiting := [job for job in jobs if not has_result(job) and missed[job.job_id] < 2]:
        time.sleep(min(30, 1 + (time.monotonic() - started) / 60))
        squeue = subprocess.run(
            ["squeue", "--me", "--array", "--noheader", "--format=%i"], capture_output=True, text=True
        )
        if squeue.returncode == 0:  # otherwise the controller does not answer now
            queued = set(squeue.stdout.split())
            for job in waiting:
                missed[job.job_id] = 0 if job.job_id in queued else missed[job.job_id] + 1
    return [result_of(job) for job in jobs]


def has_result(job: "SlurmJob") -> bool:
    """Returns whether the job's first process has left its result."""
    return job.task(0).paths.result_pickle.exists()


def result_of(job: "SlurmJob") -> JobReturn:
    """Returns the result of the first process that left one, which is rank 0 unless another process failed the job."""
    for rank in range(job.num_tasks):
        if job.task(rank).paths.result_pickle.exists():
            with suppress(RuntimeError):  # submitit raises it for errors outside of the job's function
                return job.task(rank).result()
    log = job.task(0).paths.stderr
    lost = ValueError(f"SLURM's job {job.job_id} was killed and left no result; the reason may be in {log}")
    return JobReturn(status=JobStatus.FAILED, _return_value=lost)
