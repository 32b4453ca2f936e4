"""A SLURM cluster on this machine alone, and a callback that disturbs a training on it once."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning import Callback, Trainer

HOST = socket.gethostname().split(".")[0]
DAEMONS = ("munged", "slurmctld", "slurmd")
MISSING = [name for name in DAEMONS if shutil.which(name) is None]

# A cluster that Debian's packages run as root, without systemd, cgroups and accounting. The expiry time is short since
# a requeued job waits until its credential has expired.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={slurmd_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=60
InactiveLimit=0
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 CoresPerSocket=2 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes={host} PriorityTier=2 PreemptMode=OFF
"""


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Runs a cluster with all its files in `folder`, and yields the environment that its commands need."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    conf, environment = folder / "slurm.conf", {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    port, slurmd_port = free_ports(2)
    conf.write_text(CONF.format(host=HOST, folder=folder, port=port, slurmd_port=slurmd_port))
    with (folder / "key").open("wb") as key:
        os.fchmod(key.fileno(), 0o600)
        key.write(os.urandom(1024))
    munged = [f"--{name}={folder}/munge.{name}" for name in ("socket", "log-file", "pid-file", "seed-file")]
    try:
        start(["munged", "--force", f"--key-file={folder}/key", *munged], environment)
        start(["slurmctld"], environment)
        start(["slurmd", "-N", HOST], environment)
        until(lambda: ask(environment, "sinfo", "--noheader", "--format=%T").split() == ["idle"], 30)
        yield environment
    finally:
        ask(environment, "scancel", "--signal=KILL", "--full", "--me")
        ask(environment, "scancel", "--me")
        with suppress(AssertionError):
            until(lambda: not ask(environment, "squeue", "--noheader"), 15)
        for name in ("slurmd.pid", "slurmctld.pid", "munge.pid-file"):
            stop(folder / name)


def free_ports(count: int) -> list[int]:
    """Returns ports that no process listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def start(command: list[str], environment: dict[str, str]) -> None:
    """Starts a daemon, which goes to the background by itself."""
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[0]}: {done.stderr}"


def stop(pid_file: Path) -> None:
    """Ends a daemon, if it runs."""
    if pid_file.exists():
        pid = int(pid_file.read_text())
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
            until(lambda: os.kill(pid, 0), 10)  # it raises when the process is gone


def ask(environment: dict[str, str], *command: str) -> str:
    """Returns the output of one of SLURM's commands."""
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


def until(met: Callable, seconds: float) -> None:
    """Waits until `met()` is true; raises AssertionError after so many seconds."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, f"not met after {seconds} s"
        time.sleep(0.1)


class Once(Callback):
    """Runs a shell command at one step of a training, which a resumed training does not reach again.

    Args:
        commands: shell commands by the seed of the run. `$JOB` stands for the job in SLURM's spelling.
        seed: seed of the run.
        step: the step before which the command runs.
        wait: seconds that the training waits at most for a signal after that.
    """

    def __init__(self, commands: dict[int, str], seed: int, step: int, wait: float):
        self.command, self.step, self.wait = commands.get(seed), step, wait

    def on_train_batch_start(self, trainer: Trainer, *_) -> None:
        """Runs the command."""
        if self.command is None or trainer.global_step != self.step or not trainer.is_global_zero:
            return
        array, own = (os.environ.get(f"SLURM_{name}") for name in ("ARRAY_JOB_ID", "JOB_ID"))
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else own
        subprocess.run(self.command, shell=True, env={**os.environ, "JOB": job}, stdout=sys.stderr)
        end = time.monotonic() + self.wait
        while not trainer.checkpoint_callback.received and time.monotonic() < end:
            time.sleep(0.05)
