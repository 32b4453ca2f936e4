"""A CUDA device without memory: real code runs on it on any machine, and every wait of the host for it is counted.

Tensors of the fake device have shapes and no values; operations on them cost nothing and raise where devices mix. All
other tensors are real, so code on the CPU around the device, such as random draws, works as ever.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
SCALARS = {aten.item, aten._local_scalar_dense}
READS = {*SCALARS, aten.equal, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.bincount}
PROJECT = Path(__file__).parents[1]


class FakeCuda(TorchDispatchMode):
    """Runs operations on the fake device on tensors without values, and all others for real.

    `waits` counts by line of this project what makes the host wait: reads of values, copies between host and device
    that are not `non_blocking`, and indices that lie on the other device. These are the operations that
    `torch.cuda.set_sync_debug_mode` warns of.
    """

    def __init__(self):
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        on_device = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not on_device and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if count := self.waits_of(func, args, kwargs, tensors):
            self.waits[place_of_call()] += count
        if func._overloadpacket in SCALARS:  # also of a copy on the CPU, which has no value either
            return 1.0 if args[0].dtype.is_floating_point else 1
        return func(*args, **kwargs)

    def waits_of(self, func, args, kwargs, tensors: list[Tensor]) -> int:
        """Returns how often an operation waits."""
        packet = func._overloadpacket
        if packet in READS:
            return int(any(tensor.device.type == "cuda" for tensor in tensors))
        if packet is aten._to_copy:
            crosses = (
                "device" in kwargs and kwargs["device"] is not None and kwargs["device"].type != args[0].device.type
            )
            return int(crosses and not kwargs.get("non_blocking"))
        if packet is aten.copy_:
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            return int(args[0].device.type != args[1].device.type and blocking)
        if packet in (aten.index, aten.index_put, aten.index_put_) and args[0].device.type == "cuda":
            return sum(
                index.device.type != "cuda" or index.dtype == torch.bool for index in args[1] if index is not None
            )
        return 0


class FusedAttention(TorchFunctionMode):
    """Attention in one kernel, which PyTorch chooses on a GPU and, without one, does not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention and args[0].device.type == "cuda":
            return aten._scaled_dot_product_flash_attention(*args)[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Makes `cuda` a device without memory while the context is open, and yields the counter of waits.

    Modules move by `onto_fake_cuda` alone.
    """
    device = FakeCuda()
    events = patch.object(torch.cuda, "Event", lambda: FakeEvent(device.waits))
    moves = patch.object(nn.Module, "to", lambda module, *_, **__: module)  # PyTorch cannot swap fake weights
    with events, moves, FakeTensorMode(allow_non_fake_inputs=True), device, FusedAttention():
        yield device


class FakeEvent:
    """An event of the fake device; who synchronizes with it waits."""

    def __init__(self, waits: Counter[str]):
        self.waits = waits

    def record(self) -> None:
        """Does nothing."""

    def synchronize(self) -> None:
        """Counts a wait."""
        self.waits[place_of_call()] += 1


@contextmanager
def cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """Autocasts on the fake device; `torch.autocast` refuses to without a real one."""
    torch.set_autocast_dtype("cuda", dtype)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def onto_fake_cuda(module: nn.Module) -> nn.Module:
    """Replaces a module's weights by fake ones on the fake device; call it within `fake_cuda`."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(on_device(weight), weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = on_device(buffer)
    return module


def on_device(like: Tensor) -> Tensor:
    """Returns a tensor of the same shape, strides and type on the fake device."""
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=CUDA)


def place_of_call() -> str:
    """Returns file and line of the innermost call in this project's sources."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(PROJECT / "src"):
            return f"{path.name}:{frame.lineno}"
    return "elsewhere"
