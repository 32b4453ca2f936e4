import copy

import pytest
import torch
import torch.nn.functional as F

from dit4sr_pl.model import DiT4SRTransformer, LRStream, Variant, lr_stream
from dit4sr_pl.model.lr_stream import ConvInjection, LinearInjection, product
from testing.networks import randomise


def test_multiplied_projections_equal_one_after_the_other():
    """Compares output and gradients, including those of the tokens."""
    frozen, ours = (torch.nn.Linear(6, 6, dtype=torch.float64) for _ in range(2))
    frozen.requires_grad_(False)
    tokens, seen = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 6)
    outcomes = []
    for output in (F.linear(tokens, *product(ours, frozen)), ours(frozen(tokens))):
        gradients = torch.autograd.grad((output * seen).sum(), (tokens, ours.weight, ours.bias))
        outcomes.append((output, *gradients))
    torch.testing.assert_close(*outcomes)


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_merging_changes_no_output_and_no_frozen_weight(base, inputs, variant, dtype, tolerance):
    net = DiT4SRTransformer(base, variant)
    randomise(net.lr_stream)
    expected, frozen, size = net(**inputs), copy.deepcopy(base.state_dict()), sum(p.numel() for p in net.parameters())
    net.base.to(dtype)
    net.lr_stream.merge(net.base)
    merged = net.to(dtype)(**{name: tensor.to(dtype) for name, tensor in inputs.items()})
    torch.testing.assert_close(merged.float(), expected, atol=tolerance, rtol=0)
    assert all(torch.equal(tensor, frozen[name].to(dtype)) for name, tensor in base.state_dict().items())
    assert sum(p.numel() for p in net.parameters()) == size
    assert {p.dtype for p in net.parameters()} == {dtype}


@torch.no_grad()
def test_a_merged_network_multiplies_no_matrices_of_weights(base, inputs, monkeypatch):
    net = DiT4SRTransformer(base)
    net.lr_stream.merge(base)
    monkeypatch.setattr(lr_stream, "product", lambda *_: pytest.fail("weights multiplied again"))
    net(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(8, 32), (32, 8), (16, 16), (1, 5)])
def test_injection_convolves_on_the_token_grid(grid):
    """Compares it with the written-out sum over the nine neighbours of every token."""
    height, width = grid
    injection = ConvInjection(6)
    randomise(injection)
    eta = torch.randn(2, height * width, 6)
    tokens = eta.unflatten(1, grid)
    kernel = injection.conv.weight[:, 0]
    expected = torch.empty_like(tokens)
    for row in range(height):
        for column in range(width):
            total = injection.conv.bias.expand(2, -1).clone()
            for i in range(3):
                for j in range(3):
                    y, x = row + i - 1, column + j - 1
                    if 0 <= y < height and 0 <= x < width:
                        total += kernel[:, i, j] * tokens[:, y, x]
            expected[:, row, column] = total
    torch.testing.assert_close(injection(eta, grid), expected.flatten(1, 2), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_linear_injection_keeps_tokens_apart():
    injection = LinearInjection(6)
    randomise(injection)
    eta = torch.randn(1, 12, 6)
    changed = eta.clone()
    changed[:, 5] += 1
    moved = (injection(eta, (3, 4)) != injection(changed, (3, 4))).any(dim=-1)
    assert moved.nonzero().tolist() == [[0, 5]]


def test_starts_at_zero_and_at_the_pretrained_output(base, variant):
    stream = DiT4SRTransformer(base, variant).lr_stream
    for ours, theirs in zip(stream.blocks, base.transformer_blocks, strict=True):
        for attention, frozen in ((ours.attn, theirs.attn), (ours.attn2, theirs.attn2)):
            if attention is None:
                continue
            assert not attention.k.weight.any() and not attention.v.bias.any()
            if attention.needs_output:
                assert not attention.q.weight.any()
                assert torch.equal(attention.out.weight, frozen.to_out[0].weight)
        if ours.injection is not None:
            assert not any(parameter.any() for parameter in ours.injection.parameters())


def test_nothing_is_built_that_nothing_uses(base):
    last = LRStream.over(base, Variant(lr_injection="none")).blocks[-1]
    assert {name.split(".")[1] for name, _ in last.named_parameters()} == {"k", "v"}


@pytest.mark.parametrize(
    "switches",
    [
        {"lr_integration": "both"},
        {"lr_injection": "deep"},
        {"lr_integration": "none", "lr_injection": "none"},
        {"lr_integration": "none", "legacy_lr_keys": True},
    ],
)
def test_variants_that_make_no_sense_are_refused(switches):
    with pytest.raises(ValueError, match="variant"):
        Variant(**switches)
