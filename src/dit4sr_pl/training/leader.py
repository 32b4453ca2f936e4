"""One process of a run decides for all what depends on the file system: whether and where it starts.

Machines see a network file system at different times. If every process looked for itself, some would resume and others
begin. No PyTorch for a run on one device.
"""

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import DictConfig

from dit4sr_pl.common.devices import device_count

DECISION = "DIT4SR_PL_DECISION"  # environment variable, for the processes that this one starts
PATIENCE = 180  # seconds until a machine must see a file that another one has seen


@dataclass(frozen=True)
class Decision:
    """The state of the run's folder as the first device found it.

    Args:
        finished: steps of a finished run; 0: there is something to train.
        checkpoint: the checkpoint to resume from; None: the run begins.
        step: its step.
        size: its size in bytes.
        gradient_checkpointing: whether blocks are computed again in the backward pass.
    """

    finished: int = 0
    checkpoint: str | None = None
    step: int = 0
    size: int = 0
    gradient_checkpointing: bool = False

    def wait_for_checkpoint(self) -> None:
        """Waits until this machine sees the checkpoint, too; raises FileNotFoundError if it does not in time."""
        deadline = time.monotonic() + PATIENCE
        while self.checkpoint is not None and not has_size(Path(self.checkpoint), self.size):
            if time.monotonic() > deadline:
                raise FileNotFoundError(
                    f"{self.checkpoint}: not seen by this machine, and by the first one; give a folder that all see"
                )
            time.sleep(1)


def has_size(path: Path, size: int) -> bool:
    """Returns whether a file is there with this size."""
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def agree(trainer: DictConfig, decide: Callable[[], Decision]) -> Decision:
    """Returns what the first process decides, in every process of a run.

    Args:
        trainer: config of the trainer.
        decide: called in the first process alone.

    Raises:
        ValueError: the first process raised an error; that one raises its own.
    """
    if device_count(trainer.devices, trainer.accelerator) * trainer.num_nodes == 1:
        return decide()
    failures: list[Exception] = []

    def attempt() -> str:
        try:
            return json.dumps({"decision": asdict(decide())})
        except Exception as error:
            failures.append(error)
            return json.dumps({"error": str(error)})

    text = os.environ.get(DECISION) or exchanged(trainer, attempt)
    if failures:
        raise failures[0]
    read = json.loads(text)
    if "error" in read:
        raise ValueError(read["error"])
    os.environ[DECISION] = text
    return Decision(**read["decision"])


def start_torch() -> None:
    """Imports PyTorch and Lightning.

    Optimizer moments that decay into denormals would make a CPU ten times slower; the switch must be set before threads
    start. Lightning's list of devices and its tips are hidden.
    """
    import lightning  # noqa: F401
    import torch

    torch.set_flush_denormal(True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def exchanged(trainer: DictConfig, attempt: Callable[[], str]) -> str:
    """Returns the text of the first process, in every process that runs so far."""
    start_torch()
    from hydra.utils import instantiate
    from lightning import LightningModule

    strategy = instantiate(trainer, logger=False, callbacks=None, enable_checkpointing=False).strategy
    if strategy.cluster_environment.creates_processes_externally:  # by torchrun or SLURM: all of them are here
        strategy.connect(LightningModule())  # FSDP's asks for one
        strategy.setup_environment()
        return strategy.broadcast(attempt() if strategy.is_global_zero else None)
    first = leads(trainer)
    if trainer.num_nodes == 1:
        return attempt()  # Lightning starts the others later
    # One process per machine, until each starts those of its further devices.
    from torch.distributed import TCPStore

    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]:
        raise ValueError(f"trainer.num_nodes={trainer.num_nodes}: set {', '.join(missing)} on every machine")
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # PyTorch's own store of this address, which the first process opens again, is then the same one.
    store = TCPStore(*address, is_master=first, wait_for_workers=False, multi_tenant=True)
    if first:
        store.set(DECISION, attempt())
        STORES.append(store)
    return store.get(DECISION).decode()


STORES: list = []  # kept for the machines that ask later


def forget() -> None:
    """Removes the decision when a run ends, so that the next one in this process decides anew."""
    os.environ.pop(DECISION, None)


def leads(trainer: DictConfig) -> bool:
    """Returns whether this process writes the run's files: on several devices only rank 0 does.

    A run on one device has one process, whatever rank the environment names: a second process is a second run.
    """
    ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))
    one = device_count(trainer.devices, trainer.accelerator) == trainer.num_nodes == 1
    return one or all(rank == "0" for rank in ranks)
