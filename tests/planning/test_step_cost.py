"""Counted steps against steps that ran: PyTorch's FLOP counter and PyTorch's memory profiler."""

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, SD3Transformer2DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dit4sr_pl.backbone.autoencoder import LatentCoder
from dit4sr_pl.common.files import ASSETS
from dit4sr_pl.model import DiT4SRTransformer, Variant, block
from dit4sr_pl.planning.meta_backbone import MetaBackbone
from dit4sr_pl.planning.step_cost import CostCounter, StepCost, fused_norms, normalise_in_float32, step_cost

BATCH, IMAGE, TEXT = 2, 64, 16
SHORT = {"num_layers": 3, "dual_attention_layers": [0, 1]}


class ShortMetaBackbone(MetaBackbone):
    """tiny-sd3 with three blocks."""

    def config(self, part: str) -> dict:
        return super().config(part) | (SHORT if part == "transformer" else {})


def backbone(precision: str) -> MetaBackbone:
    return ShortMetaBackbone(ASSETS / "tiny-sd3", "float32" if precision == "32-true" else "bfloat16")


@cache
def counted(precision: str, image: int = IMAGE, **network) -> StepCost:
    shapes = backbone(precision)
    sizes = {"batch": BATCH, "image": image, "text_tokens": TEXT, "precision": precision}
    net = shapes.network(partial(DiT4SRTransformer, **network))
    return step_cost(net, shapes.coder(), partial(torch.optim.AdamW, lr=1e-4), **sizes)


def real_step(precision: str, **network):
    """Returns a function that runs the same step on real tensors, with gradients and moments already there."""
    shapes = backbone(precision)
    net = DiT4SRTransformer(SD3Transformer2DModel.from_config(shapes.config("transformer")), **network)
    coder = LatentCoder(AutoencoderDC.from_config(shapes.config("vae")))
    nn.Module.to(net.base, shapes.dtype), nn.Module.to(coder.vae, shapes.dtype)
    if precision != "32-true":
        normalise_in_float32(net)
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=True)
    optimizer.step()
    images, timestep = torch.rand(BATCH, 3, IMAGE, IMAGE), torch.full((BATCH,), 500.0)
    embeds, pooled = torch.randn(BATCH, TEXT, 64, dtype=shapes.dtype), torch.randn(BATCH, 64, dtype=shapes.dtype)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
            clean, lr_latent = coder.encode(images), coder.encode(images)
            velocity = net(clean, lr_latent, timestep, embeds, pooled)
        (velocity.float() - clean).square().mean().backward()
        optimizer.step()

    return step


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("injection", ["none", "linear"])
def test_flops_are_those_of_pytorchs_counter(injection, checkpointing):
    network = {"variant": Variant(lr_injection=injection), "gradient_checkpointing": checkpointing}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it knows no fused kernel of a CPU
        real_step("32-true", **network)()
    assert counted("32-true", **network).work.flops == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_flops_of_a_depthwise_convolution():
    """PyTorch's counter is wrong by the number of channels, so the expected number is worked out by hand: 9
    multiplications and additions per value, and in the backward as many for each of the two gradients."""
    conv = nn.Conv2d(8, 8, kernel_size=3, padding=1, groups=8)
    images = torch.randn(2, 8, 5, 7, requires_grad=True)
    with CostCounter() as counter:
        result = conv(images)
        assert counter.work.flops == 2 * 9 * images.numel()
        result.sum().backward()
    assert counter.work.flops == 3 * 2 * 9 * images.numel()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_memory_is_what_the_profiler_sees(precision, checkpointing, monkeypatch):
    monkeypatch.setattr(block, "attention", F.scaled_dot_product_attention)  # as on a GPU
    step = real_step(precision, gradient_checkpointing=checkpointing)
    with fused_norms():  # as on a GPU
        step()  # kernels' own lasting buffers
    with fused_norms(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    peak = highest_sum(profiled)
    assert counted(precision, gradient_checkpointing=checkpointing).activations == pytest.approx(peak, rel=0.1)


def highest_sum(profiled: profile) -> int:
    """Returns the most bytes allocated at once, above those at the start."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.slow
def test_checkpointing_trades_memory_for_flops():
    of = partial(counted, "bf16-mixed", image=128)
    kept, recomputed = (of(gradient_checkpointing=switch) for switch in (False, True))
    assert recomputed.activations < 0.6 * kept.activations
    assert recomputed.forward.flops == kept.forward.flops
    again = recomputed.backward.flops - kept.backward.flops
    assert again == pytest.approx(kept.forward.flops, rel=0.05)


@pytest.mark.slow
def test_activations_grow_with_the_tokens_and_not_with_their_square():
    """A GPU's fused attention keeps no scores; the plain one of a CPU would keep them all."""
    small, large = (counted("bf16-mixed", image=image).activations for image in (256, 512))
    assert large == pytest.approx(4 * small, rel=0.1)


@pytest.mark.slow
def test_frozen_weights_get_no_gradient():
    """The backward costs two forwards where all is trained; here it is about one and a half."""
    cost = counted("32-true")
    assert cost.backward.flops < 1.7 * cost.forward.flops
