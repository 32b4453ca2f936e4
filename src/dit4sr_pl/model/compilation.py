"""Compiling a network block by block, and replaying its evaluations as CUDA graphs."""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn

# PyTorch's limit is 8 versions of a block's code. A network has up to four kinds of blocks, and each takes a version
# per shape, and per precision and use of gradients.
VERSIONS = 64
WARM_UP = 3  # evaluations before a capture, in which blocks are compiled and libraries set up what they need
GRAPHS = 8  # that are kept, those of the shapes that came last
Capture = Callable[[Callable[..., Tensor], list[Tensor]], tuple[Callable[[], None], Tensor]]


def compile_blocks(net: nn.Module, backend: str = "inductor") -> None:
    """Compiles every block of a network, when it runs first, for exactly the shapes that come.

    Blocks of one kind share their code, also with those of another network, so few graphs serve all of them.

    Args:
        net: DiT4SR or a baseline.
        backend: PyTorch's name of the compiler; `eager` finds graphs and compiles nothing.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VERSIONS)
    for block in net.units:
        block.compile(fullgraph=True, dynamic=False, backend=backend)


class CUDAGraphs:
    """A function that replays one CUDA graph per shape of its inputs, so that the host launches no kernel by itself.

    Graphs read weights where they lay at the capture: replace this object when weights have moved. All graphs share one
    pool of memory, so they take as much as the largest.

    Args:
        function: function from tensors to a tensor, in which the host reads nothing from the device.
        capture: returns a function that computes `function` of static inputs again, and the tensor that it writes;
            None: a CUDA graph does it.
    """

    def __init__(self, function: Callable[..., Tensor], capture: Capture | None = None):
        self.function = function
        self.capture = capture or partial(capture_graph, pool=torch.cuda.graph_pool_handle())
        self.graphs: dict[tuple, tuple[list[Tensor], Callable[[], None], Tensor]] = {}

    @torch.no_grad()
    def __call__(self, *given: Tensor, **named: Tensor) -> Tensor:
        """Returns the function of these tensors, in memory of its own."""
        count, given = len(given), (*given, *named.values())
        key = (*named, *((tuple(each.shape), each.dtype) for each in given))
        if key not in self.graphs:
            static = [each.clone() for each in given]
            function = lambda *all: self.function(*all[:count], **dict(zip(named, all[count:], strict=True)))  # noqa: E731
            self.graphs[key] = static, *self.capture(function, static)
        static, replay, output = self.graphs[key] = self.graphs.pop(key)  # the one that came last is the last one
        for oldest in list(self.graphs)[:-GRAPHS]:
            del self.graphs[oldest]
        for ours, each in zip(static, given, strict=True):
            ours.copy_(each)
        replay()
        return output.clone()


def capture_graph(
    function: Callable[..., Tensor], static: list[Tensor], pool: tuple[int, int]
) -> tuple[Callable[[], None], Tensor]:
    """Captures a function of static inputs; arguments and results are those of `CUDAGraphs`' `capture`."""
    stream = capture_stream(static[0].device)
    with torch.cuda.device(stream.device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function(*static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):  # others may use the device
            output = function(*static)
    return graph.replay, output


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the stream of all captures on a device; captures on one stream can share memory."""
    return torch.cuda.Stream(device)


def capture_graphs(net: nn.Module) -> None:
    """Lets a network replay CUDA graphs from now on. Its weights must be where, and what, they will be.

    Args:
        net: DiT4SR or a baseline, on a CUDA device.

    Raises:
        ValueError: it is on another device.
    """
    if net.base.device.type != "cuda":
        raise ValueError(f"cuda_graph=true needs a CUDA device, and not {net.base.device}; give cuda_graph=false")
    net.forward = CUDAGraphs(net.forward)


def is_compiled(net: nn.Module) -> bool:
    """Returns whether a network's blocks are compiled, or graphs captured, so that every new shape costs time."""
    return isinstance(net.forward, CUDAGraphs) or any(block._compiled_call_impl is not None for block in net.units)
