"""A base that is stored in fewer bits computes exactly what a base of its rounded weights computes."""

import copy

import pytest
import torch

from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.cli.checks import QUANTIZATIONS
from dit4sr_pl.model import DiT4SRTransformer, SD3ControlNet
from dit4sr_pl.model.quantized import KINDS, full_weight, linears_of, quantize, stored_bytes
from dit4sr_pl.model.trained_part import fingerprint
from dit4sr_pl.restoration.restorer import Restorer
from testing.networks import randomise
from testing.toy_runs import SAMPLER, TOY_SD3

ERRORS = {"int8": (0.002, 0.01), "fp8": (0.01, 0.04), "nf4": (0.05, 0.2)}  # of weights, the smallest and the largest


def backbone(kind: str | None = None, dtype: str = "float32") -> Backbone:
    return Backbone(str(TOY_SD3), dtype, 8, quantization=kind)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def step(net: torch.nn.Module, autocast: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the velocity, and the gradients of all that is trained in one vector."""
    config, draw = net.base.config, torch.Generator().manual_seed(0)
    shapes = (2, config.in_channels, 8, 8), (2, config.in_channels, 8, 8), (2,)
    shapes = (*shapes, (2, 16, config.joint_attention_dim), (2, config.pooled_projection_dim))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        velocity = net(*(torch.randn(shape, generator=draw) for shape in shapes)).float()
    velocity.square().mean().backward()
    gradients = [weight.grad.flatten() for weight in net.trained.parameters() if weight.requires_grad]
    net.zero_grad()
    return velocity.detach(), torch.cat(gradients)


def test_the_kinds_are_those_that_commands_know():
    assert KINDS == QUANTIZATIONS == tuple(ERRORS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("network", [DiT4SRTransformer, SD3ControlNet])
def test_a_training_step_equals_the_one_over_the_rounded_weights(kind, autocast, network):
    if network is SD3ControlNet:
        network = lambda base: SD3ControlNet(base, num_layers=1)  # noqa: E731
    base = backbone(dtype="bfloat16" if autocast else "float32").transformer
    rounded = copy.deepcopy(base)
    net = network(base)
    randomise(net.trained.float())
    quantize([base], kind)
    for (_, stored), (*_, linear) in zip(quantized(base), linears_of(rounded), strict=True):
        with torch.no_grad():
            smallest, largest = ERRORS[kind]
            assert smallest < difference(full_weight(stored), linear.weight) < largest
            linear.weight.copy_(full_weight(stored))
    reference = network(rounded)
    reference.trained.float().load_state_dict(net.trained.state_dict())
    (velocity, gradients), expected = step(net, autocast), step(reference, autocast)
    torch.testing.assert_close(velocity, expected[0], atol=1e-5, rtol=1e-5)
    assert difference(gradients, expected[1]) < 1e-5


def quantized(base):
    modules = [module for block in base.transformer_blocks for module in block.modules()]
    return [child for module in modules for child in module.named_children() if hasattr(child[1], "stored")]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_that_plan_counts_are_those_that_are_stored(kind):
    base = backbone(dtype="bfloat16").transformer
    expected, plain = stored_bytes(base, kind), stored_bytes(base, None)
    quantize([base], kind)
    stores = [buffer.nbytes for name, buffer in base.named_buffers() if name.endswith((".stored", ".scales"))]
    assert sum(stores) + sum(parameter.nbytes for parameter in base.parameters()) == expected < plain


def test_moving_a_quantized_base_to_another_dtype_keeps_its_stored_weights():
    base = backbone("fp8").transformer
    quantize([base], "fp8")
    before = [full_weight(linear).clone() for _, linear in quantized(base)]
    torch.nn.Module.to(base, torch.float16)
    assert all(torch.equal(full_weight(linear), old) for (_, linear), old in zip(quantized(base), before, strict=True))


def test_a_quantized_base_keeps_its_fingerprint_and_takes_no_new_network():
    backbone_ = backbone("int8")
    before = fingerprint(backbone_.transformer)
    backbone_.quantize()
    assert fingerprint(backbone_.transformer) == before
    with pytest.raises(ValueError, match="quantized already"):
        DiT4SRTransformer(backbone_.transformer)


@pytest.mark.slow
def test_a_restored_image_is_near_the_one_of_the_plain_base():
    def restored(kind: str | None) -> torch.Tensor:
        parts = Backbone("tiny-sd3", "float32", 8, quantization=kind), SAMPLER, "tiny-dit4sr", torch.device("cpu")
        lr = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        return Restorer.load(*parts)(lr, (64, 64), [""], ["a"], seed=0)

    assert 1e-4 < difference(restored("int8"), restored(None)) < 0.02
