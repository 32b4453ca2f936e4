"""How many devices a setting of Lightning's names. No PyTorch, unless all devices of a machine are asked for."""

import re
from collections.abc import Sequence

ALL = ("auto", "-1", -1)


def device_count(devices: int | str | Sequence[int], accelerator: str) -> int:
    """Returns the number of devices per node that `trainer.devices` names.

    Args:
        devices: a number, a list of devices (`[0, 2]`), the same as text (`0,2`), or all of them (`auto`, -1).
        accelerator: `cpu`, `gpu`, `auto` or another of Lightning's.

    Raises:
        ValueError: it names no device, or single processors.
    """
    on_cpu = accelerator == "cpu"
    if devices in ALL:
        count = 1 if on_cpu else gpu_count()
        if count or accelerator == "auto":
            return max(1, count)
        raise ValueError(f"trainer.devices={devices}: there is no GPU here; take trainer=cpu")
    if isinstance(devices, str) and re.fullmatch(r"\d+", devices):
        devices = int(devices)
    if isinstance(devices, int) and not isinstance(devices, bool) and devices > 0:
        return devices
    numbers = [part for part in devices.split(",") if part] if isinstance(devices, str) else devices
    if isinstance(numbers, int) or not numbers or not all(str(number).strip().isdecimal() for number in numbers):
        raise ValueError(f"trainer.devices={devices}: give a number, a list of GPUs such as [0,2], or auto")
    if on_cpu:
        raise ValueError(f"trainer.devices={devices}: processors are not chosen by number; take trainer.devices=1")
    return len(numbers)


def gpu_count() -> int:
    """Returns the number of CUDA devices of this machine."""
    import torch

    return torch.cuda.device_count()
