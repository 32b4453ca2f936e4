"""The LR stream's side of a pass, kept for others, against a network that computes it anew and replaces it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dit4sr_pl.model import DiT4SRTransformer, LRCache, Variant, block
from dit4sr_pl.model.compilation import compile_blocks
from testing.networks import VARIANTS, randomise


@pytest.fixture
def net(base, variant) -> DiT4SRTransformer:
    net = DiT4SRTransformer(base, variant)
    randomise(net.lr_stream)
    return net.eval()


@pytest.fixture
def later(inputs) -> dict[str, torch.Tensor]:
    """Inputs of a pass further along the flow and with another prompt, of the same LR latents."""
    torch.manual_seed(3)
    changed = {name: torch.randn_like(inputs[name]) for name in ("noisy_latent", "prompt_embeds")}
    return inputs | changed | {"timestep": torch.tensor([1.0, 640.0])}


def recomputed(net, first, second, monkeypatch) -> torch.Tensor:
    """Returns the velocity of a second pass in which all LR tokens are computed, and what others read of them is then
    replaced by what the first pass read.
    """
    seen, joint_attention = [], block.joint_attention

    def recording(noise, *others):
        if net.blocks[0].joint:
            seen.append(others[0][1:])
        return joint_attention(noise, *others)

    def replacing(noise, *others):
        if not net.blocks[0].joint:
            return joint_attention(noise, *others)
        (queries, keys, _), (kept_keys, kept_values) = others[0], seen.pop(0)
        kept_keys = keys if net.variant.legacy_lr_keys else kept_keys  # those come from the noise, which always runs
        return joint_attention(noise, (queries, kept_keys, kept_values), *others[1:])

    injections = [each.injection for each in net.lr_stream.blocks if each.injection is not None]
    injected = []
    with monkeypatch.context() as patched:
        patched.setattr(block, "joint_attention", recording)
        hooks = [each.register_forward_hook(lambda *args: injected.append(args[-1])) for each in injections]
        net(**first)
        patched.setattr(block, "joint_attention", replacing)
        [hook.remove() for hook in hooks]
        hooks = [each.register_forward_hook(lambda *_: injected.pop(0)) for each in injections]
        velocity = net(**second)
        [hook.remove() for hook in hooks]
    assert not seen and not injected
    return velocity


@torch.no_grad()
@pytest.mark.parametrize("variant", [*VARIANTS.values(), Variant(legacy_lr_keys=True)], ids=[*VARIANTS, "legacy"])
def test_a_pass_that_reads_equals_one_that_computes_and_replaces(net, inputs, later, monkeypatch):
    for merged in (False, True):
        if merged:
            net.lr_stream.merge(net.base)
        expected, cache = recomputed(net, inputs, later, monkeypatch), LRCache.empty(len(net.blocks))
        assert torch.equal(net(**inputs, lr_cache=cache), net(**inputs)) and cache.full
        velocity = net(**later, lr_cache=cache)
        torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(net(**later, lr_cache=cache), velocity)  # it may be read again
        assert not torch.allclose(velocity, net(**later), atol=1e-3)


@torch.no_grad()
def test_a_pass_with_its_own_cache_is_the_pass(net, inputs):
    cache = LRCache.empty(len(net.blocks))
    velocity = net(**inputs, lr_cache=cache)
    torch.testing.assert_close(net(**inputs, lr_cache=cache), velocity, atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("variant", [Variant()], ids=["full"])
def test_caches_of_tiles_are_split_and_joined_in_any_order(net, inputs):
    """A pass takes two tiles under the first prompt, then the same two under the second."""
    doubled = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
    doubled["prompt_embeds"] = torch.randn(4, 5, 24)
    cache = LRCache.empty(len(net.blocks))
    net(**doubled, lr_cache=cache)
    first, second = cache.split(2)
    order = [1, 0, 3, 2]
    turned = {name: tensor[order] for name, tensor in doubled.items()}
    expected = net(**doubled, lr_cache=cache)
    torch.testing.assert_close(net(**turned, lr_cache=LRCache.join([second, first])), expected[order])
    alone = {name: tensor[[1, 3]] for name, tensor in doubled.items()}
    torch.testing.assert_close(net(**alone, lr_cache=LRCache.join([second])), expected[[1, 3]], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("variant", [Variant()], ids=["full"])
def test_a_pass_that_reads_costs_about_half(net, inputs):
    net.lr_stream.merge(net.base)
    cache, flops = LRCache.empty(len(net.blocks)), []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            net(**inputs, lr_cache=cache)
        flops.append(counter.get_total_flops())
    assert 0.4 < flops[1] / flops[0] < 0.6


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("variant", [Variant()], ids=["full"])
def test_compiled_blocks_fill_and_read_a_cache(net, inputs, later):
    cache = LRCache.empty(len(net.blocks))
    expected = [net(**inputs, lr_cache=cache), net(**later, lr_cache=cache)]
    torch.compiler.reset()
    compile_blocks(net, backend="eager")
    for _ in range(2):
        cache = LRCache.empty(len(net.blocks))
        compiled = [net(**inputs, lr_cache=cache), net(**later, lr_cache=cache)]
        torch.testing.assert_close(compiled, expected)
