import pytest
import torch

from dit4sr_pl.model import SD3ControlNet
from testing.networks import randomise

SD3_INPUTS = {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "pooled_projections"}


@pytest.mark.parametrize("dual", [(0, 1), ()], ids=["sd3.5", "sd3"])
def test_starts_as_the_base_and_then_depends_on_the_lr_latent(base, inputs, dual):
    base = type(base).from_config(dict(base.config) | {"num_layers": 4, "dual_attention_layers": dual})
    net = SD3ControlNet(base, num_layers=2)
    arguments = {SD3_INPUTS.get(name, name): inputs[name] for name in inputs if "latent" not in name}
    with torch.no_grad():
        expected = base(inputs["noisy_latent"], **arguments).sample
        torch.testing.assert_close(net(**inputs), expected, atol=0, rtol=0)
        randomise(net.controlnet)
        first = net(**inputs)
        second = net(**inputs | {"lr_latent": inputs["lr_latent"] + 1})
    assert (first - expected).abs().max() > 1e-3 and (second - first).abs().max() > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_trainable_weight_gets_a_gradient_and_no_frozen_one(base, inputs, checkpointing):
    base = type(base).from_config(dict(base.config) | {"num_layers": 4})
    net = SD3ControlNet(base, num_layers=2, gradient_checkpointing=checkpointing).train()
    randomise(net.controlnet)  # behind layers of zeros nothing gets a gradient
    net(**inputs).square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    assert not any(p.requires_grad for p in net.base.parameters())
    assert all(p.grad.any() for p in net.controlnet.parameters() if p.requires_grad)


def test_copies_the_base_and_leaves_its_config_alone(base):
    net = SD3ControlNet(base, num_layers=1)
    assert base.config.num_layers == 3 and "extra_conditioning_channels" not in base.config
    copied = net.controlnet.transformer_blocks[0].state_dict()
    assert all(torch.equal(tensor, base.transformer_blocks[0].state_dict()[name]) for name, tensor in copied.items())
    assert not any(p.any() for p in net.controlnet.controlnet_blocks.parameters())
    assert not net.controlnet.pos_embed_input.proj.weight.any()


@pytest.mark.parametrize("num_layers", [0, 2, 3, 4])
def test_layers_that_would_stay_without_a_gradient_are_refused(base, num_layers):
    with pytest.raises(ValueError, match=f"num_layers={num_layers}; give a proper divisor of the 3 blocks"):
        SD3ControlNet(base, num_layers)
