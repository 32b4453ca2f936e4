"""Contexts in which tensors are computed in their own precision, whatever a training has set."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Returns a context without autocast, in which operations compute in the dtype of their tensors."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Turns off autocast, and TensorFloat-32 in matrix products and in cuDNN's convolutions.

    Training turns TensorFloat-32 on for products, and PyTorch has it on for convolutions.
    """
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # `cudnn.flags(allow_tf32=False)` would turn cuDNN off
    try:
        with without_autocast(device):
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
