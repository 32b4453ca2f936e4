"""Compiled networks against eager ones, and how many graphs they take."""

import copy

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch._dynamo.utils import counters

from dit4sr_pl.cli.checks import check_compiler
from dit4sr_pl.model import DiT4SRTransformer
from dit4sr_pl.model.compilation import compile_blocks, is_compiled
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
