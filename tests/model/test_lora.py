"""LoRA on the frozen base: a network without it stays what it was, and merged weights do what trained ones do."""

import copy
from dataclasses import replace

import pytest
import torch

from dit4sr_pl.model import DiT4SRTransformer, LRStream, Variant, load_part, save_part
from dit4sr_pl.model.lora import ATTENTION, LoRA
from dit4sr_pl.model.trained_part import base_of, fingerprint, fit_part, part_of
from dit4sr_pl.restoration.restorer import build_network
from testing.networks import VARIANTS, randomise

EVERYWHERE = LoRA(rank=2, alpha=4.0, targets=(*ATTENTION, "ff.net.0.proj", "ff.net.2", "norm1.linear"))


def trained_network(base, lora=EVERYWHERE, variant=None) -> DiT4SRTransformer:
    """Returns a network whose LR stream and LoRA are random."""
    net = DiT4SRTransformer(base, variant, lora=lora).eval()
    randomise(net.lr_stream)
    return net


def test_without_a_rank_there_is_no_key_and_no_layer(base):
    net = DiT4SRTransformer(base, lora=replace(EVERYWHERE, rank=0))
    assert net.base is base and "lora" not in net.network_config()
    assert not any("lora" in name for name in net.lr_stream.state_dict())


def test_new_layers_change_nothing(base, inputs):
    lr_stream = LRStream.over(base, Variant())
    randomise(lr_stream)
    plain = DiT4SRTransformer(base, lr_stream=lr_stream)
    expected = plain(**inputs)
    with_lora = DiT4SRTransformer(base, lora=EVERYWHERE)
    with_lora.lr_stream.load_state_dict(lr_stream.state_dict(), strict=False)
    assert torch.equal(with_lora(**inputs), expected)


def test_the_base_and_its_teacher_do_not_notice_a_student(base, inputs):
    teacher = trained_network(base, lora=None)
    before, weights = teacher(**inputs), {name: each.clone() for name, each in base.state_dict().items()}
    identity = fingerprint(base)
    student = trained_network(base)
    assert not torch.allclose(student(**inputs), before, atol=1e-3)
    assert torch.equal(teacher(**inputs), before)
    student.merge()
    assert torch.equal(teacher(**inputs), before)
    assert all(torch.equal(base.state_dict()[name], each) for name, each in weights.items())
    assert fingerprint(base) == identity


def test_the_fingerprint_of_a_base_with_layers_is_that_of_the_base(base):
    assert fingerprint(trained_network(base).base) == fingerprint(base)


def test_frozen_weights_are_in_memory_once(base):
    shared = {weight.data_ptr() for weight in base.parameters()}
    net = trained_network(base)
    own = {weight.data_ptr() for weight in net.parameters() if not weight.requires_grad} - shared
    assert not own
    assert {id(weight) for weight in net.lr_stream.parameters()} >= {
        id(weight) for weight in net.base.parameters() if weight.requires_grad
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_merged_weights_give_the_result_of_trained_ones(name, base, inputs):
    net = trained_network(base, variant=VARIANTS[name])
    with torch.no_grad():
        expected = net(**inputs)
        net.merge()
        assert torch.allclose(net(**inputs), expected, atol=1e-5)
    assert not any(hasattr(module, "base_layer") for module in net.modules())


@pytest.mark.parametrize("name", VARIANTS)
def test_every_trained_weight_gets_a_gradient(name, base, inputs):
    net = trained_network(base, variant=VARIANTS[name])
    net(**inputs).square().mean().backward()
    trained = {name: weight for name, weight in net.lr_stream.named_parameters() if weight.requires_grad}
    assert any(name.startswith("lora.") for name in trained)
    assert not [name for name, weight in trained.items() if weight.grad is None or not weight.grad.any()]


def test_the_lr_projections_multiply_the_updated_weight(base, inputs):
    """The LR stream passes the frozen projections, too: a slow sum says what they are with LoRA."""
    net, layer = trained_network(base, LoRA(2, 4.0, ("attn.to_q",))), 1
    ours, pair = (
        net.lr_stream.blocks[layer].attn,
        net.lr_stream.lora.transformer_blocks.get_submodule(f"{layer}.attn.to_q"),
    )
    frozen = base.transformer_blocks[layer].attn
    tokens = torch.randn(1, 5, base.inner_dim)
    plain = frozen.to_q(tokens) + 4.0 / 2 * (tokens @ pair.A.T @ pair.B.T)
    expected = ours.q(plain)
    projected = ours.project("q", net.base.transformer_blocks[layer].attn, tokens)
    assert torch.allclose(projected.transpose(1, 2).flatten(2), expected, atol=1e-5)


def test_a_file_holds_the_layers_and_what_they_are(base, inputs, tmp_path):
    net = trained_network(base)
    expected = net(**inputs)
    save_part(part_of(net, base_of(net, "toy")), tmp_path / "lr_stream.safetensors")
    part = load_part(tmp_path / "lr_stream.safetensors")
    assert part.network_config["lora"] == {"rank": 2, "alpha": 4.0, "targets": list(EVERYWHERE.targets)}
    assert part.base["fingerprint"] == fingerprint(base)
    other = build_network(base, part.network_config)
    fit_part(other, part, "file")
    assert torch.allclose(other(**inputs), expected)


def test_a_copy_of_the_network_has_layers_of_its_own(base, inputs):
    net = trained_network(base)
    copied = copy.deepcopy(net, {id(module): module for module in base.modules()})
    expected = net(**inputs)
    with torch.no_grad():
        for weight in copied.lr_stream.lora.parameters():
            weight.zero_()
    assert torch.equal(net(**inputs), expected) and not torch.equal(copied(**inputs), expected)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rank": -1}, "lora: rank=-1"),
        ({"rank": 1.5}, "lora: rank=1.5"),
        ({"alpha": 0.0}, "lora: alpha=0.0"),
        ({"targets": ()}, "lora: no targets"),
    ],
)
def test_wrong_numbers_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(EVERYWHERE, **fields)


def test_an_unknown_target_is_refused(base):
    with pytest.raises(ValueError, match="ends in 'to_z'"):
        DiT4SRTransformer(base, lora=LoRA(2, 2.0, ("to_q", "to_z")))
