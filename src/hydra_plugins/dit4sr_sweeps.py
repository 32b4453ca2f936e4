"""Sweeps in which a job that fails costs the others nothing, here and on SLURM.

Hydra finds this file by its folder's name and imports it whenever a command starts: no PyTorch, no submitit in here.
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
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from omegaconf import OmegaConf

if TYPE_CHECKING:
    from submitit import AutoExecutor, SlurmJob

STOPPED = 128 + signal.SIGTERM


class FaultTolerantSweeper(BasicSweeper):
    """Runs every job of a sweep, whatever becomes of the others, and ends with a line for each that failed."""

    def sweep(self, arguments: list[str]) -> Any:
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


class Slurm(SlurmLauncher):
    """submitit's launcher, with jobs that come back however SLURM stops them, and whose exit code is their verdict.

    SLURM kills all processes of a job when one fails. The command waits until every job has a result or is out of
    the queue; jobs do not need it to go on.
    """

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        self.check(job_overrides)
        state = Singleton.get_state()
        jobs = [(list(job), "hydra.sweep.dir", i, "", state) for i, job in enumerate(job_overrides, initial_job_idx)]
        try:
            submitted = self.executor().map_array(self, *zip(*jobs, strict=True))
        except RuntimeError as error:  # submitit's for what sbatch says, and for no srun
            raise ValueError(f"not submitted: {error}") from None
        logs = submitted[0].paths.folder.parent
        print(f"{len(jobs)} jobs submitted; this command may stop, they go on. Logs: {logs}", file=sys.stderr)
        return wait_for(submitted)

    def check(self, job_overrides: Sequence[Sequence[str]]) -> None:
        """Raises ValueError for a job that would not get a process per device: Lightning trains one run in each."""
        for job in job_overrides:
            trainer = self.hydra_context.config_loader.load_sweep_config(self.config, list(job)).trainer
            asked = {"tasks_per_node": trainer.devices, "nodes": trainer.num_nodes}
            for key, value in asked.items():
                if self.params[key] != value:
                    raise ValueError(
                        f"hydra.launcher.{key}={self.params[key]} for a run with {value}; it must be that of the "
                        "trainer, a number, and the same for all jobs of a sweep"
                    )

    def executor(self) -> "AutoExecutor":
        from submitit import AutoExecutor

        given = {key: value for key, value in self.params.items() if value is not None}
        folder, timeouts = given.pop("submitit_folder"), given.pop("max_num_timeout")
        given["srun_args"] = ["--kill-on-bad-exit=1"]  # else the others wait for a process that has died
        if cpus := given.get("cpus_per_task"):
            given["srun_args"] += [f"--cpus-per-task={cpus}"]  # which srun does not inherit since SLURM 22.05
            given["setup"] = [f"export OMP_NUM_THREADS={cpus}", *given.get("setup", [])]
        shared = OmegaConf.structured(BaseQueueConf).keys()
        executor = AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=timeouts)
        executor.update_parameters(**{key if key in shared else f"slurm_{key}": given[key] for key in given})
        return executor

    def __call__(self, *job: Any) -> JobReturn:
        """The job itself, in each of its processes."""
        signal.signal(signal.SIGTERM, stop)  # submitit has it ignored; the training puts its own in place
        try:
            result = super().__call__(*job)
        except SystemExit as end:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it comes again with a requeue
            if end.code == STOPPED:
                requeue()
            raise
        if result.status == JobStatus.FAILED:
            atexit.register(os._exit, 1)  # when submitit has written the result
        return result


def stop(signum: int, frame: FrameType | None) -> None:
    sys.exit(STOPPED if os.environ["SLURM_PROCID"] == "0" else 0)


def requeue() -> None:
    """Asks for a job once more that was stopped while SLURM counts it as running: by a signal of its own, for a node
    that shuts down or within the grace time of a preemption. Else SLURM has cancelled it, or requeued it already."""
    from submitit import JobEnvironment

    job = JobEnvironment().job_id  # `array_task`: the other one, SLURM_JOB_ID, may name the whole array
    squeue = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    if subprocess.run(squeue, capture_output=True, text=True).stdout.strip() == "RUNNING":
        subprocess.run(["scontrol", "requeue", job])


def wait_for(jobs: "Sequence[SlurmJob]") -> list[JobReturn]:
    """What became of jobs, when all are over."""
    started, missed = time.monotonic(), dict.fromkeys((job.job_id for job in jobs), 0)
    while waiting := [job for job in jobs if not has_result(job) and missed[job.job_id] < 2]:
        time.sleep(min(30, 1 + (time.monotonic() - started) / 60))
        squeue = subprocess.run(
            ["squeue", "--me", "--array", "--noheader", "--format=%i"], capture_output=True, text=True
        )
        if squeue.returncode == 0:  # else the controller does not answer now
            queued = set(squeue.stdout.split())
            for job in waiting:
                missed[job.job_id] = 0 if job.job_id in queued else missed[job.job_id] + 1
    return [result_of(job) for job in jobs]


def has_result(job: "SlurmJob") -> bool:
    return job.task(0).paths.result_pickle.exists()


def result_of(job: "SlurmJob") -> JobReturn:
    """That of the first process that left one: rank 0's but for a job that another process has failed."""
    for rank in range(job.num_tasks):
        if job.task(rank).paths.result_pickle.exists():
            with suppress(RuntimeError):  # of submitit, for what went wrong around the job
                return job.task(rank).result()
    log = job.task(0).paths.stderr
    gone = ValueError(f"SLURM's job {job.job_id} left no result, whatever killed it; {log} may know")
    return JobReturn(status=JobStatus.FAILED, _return_value=gone)
