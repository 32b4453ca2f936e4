"""Compiled networks against eager ones, and how many graphs they take."""

import contextlib
import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch._dynamo.utils import counters

from dit4sr_pl.cli.checks import check_compiler
from dit4sr_pl.model import DiT4SRTransformer
from dit4sr_pl.model.compilation import (
    GRAPHS,
    WARM_UP,
    CUDAGraphs,
    capture_graph,
    capture_graphs,
    capture_stream,
    compile_blocks,
    is_compiled,
)
from testing.networks import randomise


def test_without_a_compiler_compiling_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    check_compiler(False, "compile")
    with pytest.raises(ValueError, match="compile=true needs a C\\+\\+ compiler"):
        check_compiler(True, "compile")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of PyTorch's compiler
def test_compiled_blocks_equal_eager_ones_and_are_compiled_once(base, inputs):
    """The first and the last block are graphs of their own: the last one returns no text."""
    small = dict(base.config) | {"num_layers": 2, "dual_attention_layers": ()}
    base = SD3Transformer2DModel.from_config(small)
    eager = DiT4SRTransformer(base)
    randomise(eager.lr_stream)
    net = DiT4SRTransformer(base, lr_stream=copy.deepcopy(eager.lr_stream))
    compile_blocks(net)
    assert is_compiled(net) and not is_compiled(eager)
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        torch.testing.assert_close(net(**inputs), eager(**inputs), atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2

    for network in (net, eager):
        network(**inputs).square().mean().backward()
    gradients = zip(net.trained.parameters(), eager.trained.parameters(), strict=True)
    for ours, theirs in gradients:
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 2 + 2
    others = {name: value + 0.1 for name, value in inputs.items()}
    net(**others).square().mean().backward()
    with torch.no_grad():
        net(**others)
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of PyTorch's compiler
def test_a_compiled_block_has_finite_gradients_in_bfloat16(tiny_backbone):
    """PyTorch's compiler has made NaN of some; widths and numbers of tokens are such."""
    net = DiT4SRTransformer(tiny_backbone.transformer)
    block = net.blocks[5]
    noise, lr, text, time = (torch.randn(4, *shape) for shape in ((64, 192), (64, 192), (24, 192), (192,)))

    def gradients(run) -> list[torch.Tensor]:
        net.zero_grad()
        inputs = [tokens.clone().requires_grad_() for tokens in (noise, lr, text)]
        with torch.autocast("cpu", torch.bfloat16):
            outputs = run(*inputs, time, (8, 8))
        sum(tokens.float().square().mean() for tokens in outputs).backward()
        return [tensor.grad for tensor in (*inputs, *block.lr.parameters()) if tensor.grad is not None]

    compiled = gradients(torch.compile(block, fullgraph=True, dynamic=False))
    for ours, theirs in zip(compiled, gradients(block), strict=True):
        assert (ours - theirs).norm() <= 0.05 * theirs.norm()


def capture_on_a_cpu(function, static):
    """Stands in for `capture_graph`: a replay reads the static inputs and writes one tensor, as a graph does."""
    output = function(*static)
    return lambda: output.copy_(function(*static)), output


def test_a_graph_is_captured_once_per_shape_and_reads_the_inputs_of_every_call():
    captured = []

    def capture(function, static):
        captured.append(tuple(static[0].shape))
        assert all(each.is_contiguous() for each in static)
        return capture_on_a_cpu(function, static)

    graphs, results = CUDAGraphs(lambda a, b: a * b[:, None], capture), []
    for rows, number in ((2, 1.0), (3, 2.0), (2, 3.0), (3, 4.0), (2, 5.0)):
        given = torch.full((rows, 4), number, requires_grad=True), torch.tensor(number).expand(rows)
        results.append((graphs(*given), number * number * torch.ones(rows, 4)))
    assert captured == [(2, 4), (3, 4)]
    for ours, expected in results:  # no later call has overwritten them
        assert torch.equal(ours, expected) and not ours.requires_grad
    graphs(torch.ones(2, 4).double(), torch.ones(2).double())
    assert captured == [(2, 4), (3, 4), (2, 4)]


def test_graphs_of_the_shapes_that_came_last_are_kept():
    captured = []
    graphs = CUDAGraphs(torch.square, lambda *each: captured.append(len(each[1][0])) or capture_on_a_cpu(*each))
    for length in (1, *range(1, GRAPHS + 1), 1, GRAPHS + 1, 1, 2):  # of all but the last, 2 came longest ago
        assert torch.equal(graphs(torch.full((length,), 3.0)), torch.full((length,), 9.0))
    assert captured == [*range(1, GRAPHS + 2), 2] and len(graphs.graphs) == GRAPHS


def test_a_network_on_a_cpu_captures_no_graphs(base):
    net = DiT4SRTransformer(base)
    with pytest.raises(ValueError, match="cuda_graph=true needs a CUDA device, and not cpu; give cuda_graph=false"):
        capture_graphs(net)
    assert not is_compiled(net)
    net.forward = CUDAGraphs(net.forward, capture_on_a_cpu)
    assert is_compiled(net)  # batches of tiles are then filled up, since a new size costs a capture


def test_a_capture_warms_up_before_the_graph_and_runs_once_in_it(monkeypatch):
    """PyTorch's classes are replaced by recorders, whose arguments are held against the real signatures."""
    began, calls, signature = [], [], inspect.signature(torch.cuda.graph)

    class Recorder(contextlib.nullcontext):
        def __init__(self, *arguments, **options):
            began.append(signature.bind(*arguments, **options).arguments)
            super().__init__()

    stream = SimpleNamespace(device=torch.device("cpu"), wait_stream=lambda other: calls.append("wait"))
    names = {"graph": Recorder, "CUDAGraph": lambda: SimpleNamespace(replay="replay"), "Stream": lambda device: stream}
    names |= dict.fromkeys(("stream", "device"), contextlib.nullcontext) | {"current_stream": lambda: stream}
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    capture_stream.cache_clear()
    replay, output = capture_graph(lambda a: calls.append(len(began)) or a + 1, [torch.ones(2)], (0, 1))
    capture_stream.cache_clear()
    assert calls == ["wait", *[0] * WARM_UP, "wait", 1] and replay == "replay"
    assert torch.equal(output, torch.full((2,), 2.0))
    assert began[0]["pool"] == (0, 1) and began[0]["stream"] is stream
