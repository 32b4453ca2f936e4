from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.normalization import RMSNorm
from safetensors.torch import load_file
from torch import nn

from dit4sr_pl.model import DiT4SRTransformer, Variant, block, lr_stream
from testing.fake_cuda import cuda_autocast, fake_cuda, onto_fake_cuda
from testing.networks import randomise

GOLDEN = Path(__file__).parents[1] / "golden"
SD35_MEDIUM = dict(
    sample_size=128,
    num_layers=24,
    attention_head_dim=64,
    num_attention_heads=24,
    joint_attention_dim=4096,
    caption_projection_dim=1536,
    pooled_projection_dim=2048,
    out_channels=16,
    pos_embed_max_size=384,
    dual_attention_layers=tuple(range(13)),
    qk_norm="rms_norm",
)


# diffusers computes the frequencies of the time embedding with float32 `exp`, whose last bit depends on the processor.
# At timestep 960 that bit moves the phase by 6e-5 and the output by 1.5e-5, so the tests use the reference's own table.
FREQUENCIES = load_file(GOLDEN / "time_frequencies.safetensors")["frequencies"]


class ReferenceTimes(nn.Module):
    """The sinusoids of a timestep at the frequencies that the reference implementation ran with."""

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        phase = timestep[:, None].float() * FREQUENCIES
        return torch.cat([phase.cos(), phase.sin()], dim=-1)


def test_frequencies_of_this_processor_are_those_of_the_reference_but_for_the_last_bit():
    ours = get_timestep_embedding(torch.tensor([1e-4]), 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(ours[0, 128:], 1e-4 * FREQUENCIES, rtol=3e-7, atol=0)


@pytest.mark.parametrize("name, legacy", [("r1_dual", False), ("r1_single", False), ("q_dual", True)])
def test_agrees_with_the_reference(name, legacy):
    net = DiT4SRTransformer.from_reference(GOLDEN / name, legacy_lr_keys=legacy, injection_scale=1.2)
    net.base.time_text_embed.time_proj = ReferenceTimes()
    tensors = load_file(GOLDEN / name / "io.safetensors")
    expected = tensors.pop("output")
    with torch.no_grad():
        torch.testing.assert_close(net(**tensors), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("qk_norm, dual", [("rms_norm", (0, 1)), (None, ())], ids=["sd3.5", "sd3"])
def test_equals_sd3_when_lr_keys_are_masked(base, inputs, monkeypatch, qk_norm, dual):
    config = dict(base.config) | {"qk_norm": qk_norm, "dual_attention_layers": dual}
    base = SD3Transformer2DModel.from_config(config).eval()
    net = DiT4SRTransformer(base)
    joint_attention = block.joint_attention

    def without_lr_keys(noise, lr, *text):
        queries, keys, values = lr
        unseen = torch.empty_like(keys[:, :, :0])
        return joint_attention(noise, (queries, unseen, unseen), *text)

    monkeypatch.setattr(block, "joint_attention", without_lr_keys)
    expected = base(
        hidden_states=inputs["noisy_latent"],
        encoder_hidden_states=inputs["prompt_embeds"],
        pooled_projections=inputs["pooled_prompt_embeds"],
        timestep=inputs["timestep"],
    ).sample
    torch.testing.assert_close(net(**inputs), expected, atol=1e-6, rtol=0)


def test_zero_start_is_not_identity(base, inputs):
    """LR tokens of zeros take their share of the softmax, so only with the mask above does the network equal SD3."""
    expected = base(
        inputs["noisy_latent"], inputs["prompt_embeds"], inputs["pooled_prompt_embeds"], inputs["timestep"]
    ).sample
    assert not torch.allclose(DiT4SRTransformer(base)(**inputs), expected, atol=1e-4)


def test_attention_that_trains_in_bfloat16_equals_the_fused_one():
    queries, keys, values = torch.randn(3, 2, 4, 50, 16, dtype=torch.bfloat16)
    expected = block.attention(queries.float(), keys.float(), values.float())
    for needs_gradient in (False, True):
        attended = block.attention(queries, keys, values.requires_grad_(needs_gradient))
        assert attended.dtype == torch.bfloat16
        torch.testing.assert_close(attended.float(), expected, atol=1e-2, rtol=1e-2)


def test_every_trainable_parameter_has_a_gradient_and_no_frozen_one(base, inputs, variant):
    net = DiT4SRTransformer(base, variant)
    randomise(net.lr_stream)
    net(**inputs).square().mean().backward()
    for name, parameter in net.lr_stream.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in net.base.parameters())


def test_every_variant_differs(base, inputs, variant):
    full, other = DiT4SRTransformer(base), DiT4SRTransformer(base, variant)
    randomise(full.lr_stream), randomise(other.lr_stream)
    same = torch.allclose(full(**inputs), other(**inputs), atol=1e-5)
    assert same == (variant == Variant())


def test_gradient_checkpointing_recomputes_and_changes_nothing(base, inputs, variant, monkeypatch):
    calls = []
    forward = block.MMDiTControlBlock.forward
    monkeypatch.setattr(block.MMDiTControlBlock, "forward", lambda *args: calls.append(1) or forward(*args))
    gradients = []
    for gradient_checkpointing in (False, True):
        net = DiT4SRTransformer(base, variant, gradient_checkpointing)
        randomise(net.lr_stream)
        calls.clear()
        net(**inputs).square().mean().backward()
        assert len(calls) == (2 if gradient_checkpointing else 1) * len(net.blocks)
        gradients.append([parameter.grad for parameter in net.lr_stream.parameters()])
    torch.testing.assert_close(*gradients)


def test_legacy_keys_ignore_the_lr_keys_projection(base, inputs):
    net = DiT4SRTransformer(base, Variant(legacy_lr_keys=True))
    randomise(net.lr_stream)
    before = net(**inputs)
    for lr_block in net.lr_stream.blocks:
        torch.nn.init.normal_(lr_block.attn.k.weight)
    torch.testing.assert_close(net(**inputs), before)
    before.mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.lr_stream.parameters())


def test_parameter_counts_of_sd35_medium():
    with torch.device("meta"):
        net = DiT4SRTransformer(SD3Transformer2DModel(**SD35_MEDIUM))
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 350_877_696
    assert sum(p.numel() for p in net.parameters()) == 2_594_049_216


@pytest.mark.parametrize(
    "noisy, lr, message",
    [((1, 4, 8, 7), (1, 4, 8, 7), "multiples of the patch size"), ((1, 4, 8, 8), (1, 4, 8, 6), "one shape")],
)
def test_wrong_shapes_are_named(base, inputs, noisy, lr, message):
    with pytest.raises(ValueError, match=message):
        DiT4SRTransformer(base)(**inputs | {"noisy_latent": torch.zeros(noisy), "lr_latent": torch.zeros(lr)})


def test_streams_lie_in_memory_token_by_token_in_every_block(base, inputs):
    """The patch embedding returns them transposed, and a GPU's kernels would copy them at every norm."""
    net, seen = DiT4SRTransformer(base), []
    for each in net.blocks:
        each.register_forward_pre_hook(lambda _, streams: seen.extend(s.is_contiguous() for s in streams[:3]))
    net(**inputs)
    assert len(seen) == 3 * len(net.blocks) and all(seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_kernel_norms_queries_as_diffusers_does(dtype):
    norm, tokens = RMSNorm(16, 1e-6).to(dtype), torch.randn(2, 3, 4, 16).to(dtype)
    torch.nn.init.normal_(norm.weight)
    assert lr_stream.normed(norm, tokens).dtype == dtype
    torch.testing.assert_close(lr_stream.normed(norm, tokens), norm(tokens))


def test_blocks_keep_the_streams_dtype_under_cuda_autocast():
    """On a GPU autocast computes norms in float32, and every projection would cast the result."""
    norms, dtypes = [torch.nn.LayerNorm(8, elementwise_affine=False), RMSNorm(8, 1e-6)], []
    with fake_cuda(), cuda_autocast(torch.bfloat16):
        tokens = torch.empty(1, 2, 3, 8, dtype=torch.bfloat16, device="cuda")
        dtypes.append(norms[0](tokens).dtype)
        dtypes.append(block.standardized(norms[0], tokens).dtype)
        dtypes.append(lr_stream.normed(onto_fake_cuda(norms[1]), tokens).dtype)
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16]
