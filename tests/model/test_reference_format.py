import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit4sr_pl.model import DiT4SRTransformer, Variant
from dit4sr_pl.model.reference_format import WEIGHTS, Release, write_released
from dit4sr_pl.model.trained_part import base_of, load_part, part_of
from testing.networks import randomise
from testing.releases import GOLDEN, write_release

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
UNUSED = (".attn2.add_", ".attn2.to_add_out", ".attn2.norm_added")


@pytest.mark.parametrize("name", ["r1_dual", "r1_single", "q_dual"])
def test_round_trip_of_the_reference_folders(name, tmp_path):
    """Used weights are written as they were read, unused ones as zeros of the same shapes."""
    net = DiT4SRTransformer.from_reference(GOLDEN / name, legacy_lr_keys=name == "q_dual")
    write_released(net.base, net.lr_stream, tmp_path)
    theirs, ours = (load_file(folder / "transformer" / WEIGHTS) for folder in (GOLDEN / name, tmp_path))
    assert {n: t.shape for n, t in theirs.items()} == {n: t.shape for n, t in ours.items()}
    dead = {n for n in theirs if any(unused in n for unused in UNUSED)}
    assert all(torch.equal(theirs[n], ours[n]) for n in theirs.keys() - dead)
    assert all(not ours[n].any() for n in dead)


@pytest.mark.parametrize("scale", [1.0, 1.2, 0.3])
def test_a_network_trained_here_is_the_same_function_in_the_references_code_whose_scale_is_fixed(
    base, inputs, scale, tmp_path
):
    net = DiT4SRTransformer(base, Variant(injection_scale=scale))
    randomise(net.lr_stream)
    write_released(base, net.lr_stream, tmp_path)
    again = DiT4SRTransformer.from_reference(tmp_path)
    assert again.variant.injection_scale == 1.2
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs), net(**inputs), atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_golden_network_at_another_scale_is_written_as_the_function_that_it_is(tmp_path):
    """The injection is 1.2 times as strong as the reference's, so that a scale of 1.0 gives the golden output."""
    net = DiT4SRTransformer.from_reference(GOLDEN / "r1_dual", injection_scale=1.0)
    for block in net.lr_stream.blocks:
        block.injection.conv.weight *= 1.2
        block.injection.conv.bias *= 1.2
    write_released(net.base, net.lr_stream, tmp_path)
    tensors = load_file(GOLDEN / "r1_dual" / "io.safetensors")
    expected = tensors.pop("output")
    for folder in (tmp_path, GOLDEN / "r1_dual"):
        written = DiT4SRTransformer.from_reference(folder)(**tensors)
        torch.testing.assert_close(written, expected, atol=3e-5, rtol=0)  # at this processor's time frequencies


@torch.no_grad()
@pytest.mark.parametrize(
    "frozen, control, dtype, distance",
    [
        (HALF, HALF, None, 0.01),
        (BRAIN, BRAIN, None, 0.1),
        (HALF, SINGLE, None, 0.01),
        (BRAIN, SINGLE, None, 0.1),
        (SINGLE, HALF, None, 0.002),
        (HALF, SINGLE, SINGLE, 0.005),
        (SINGLE, SINGLE, BRAIN, 0.1),
    ],
)
def test_a_folder_in_half_precision_runs_in_one_dtype_near_the_references_float32(
    frozen, control, dtype, distance, tmp_path
):
    net = DiT4SRTransformer.from_reference(
        write_release(tmp_path, frozen=frozen, control=control, zero_keys=True), dtype=dtype
    )
    assert {tensor.dtype for tensor in net.state_dict().values()} == {dtype or frozen}
    tensors = load_file(GOLDEN / "q_dual" / "io.safetensors")
    expected = tensors.pop("output")
    half = {name: tensor if name == "timestep" else tensor.half() for name, tensor in tensors.items()}
    for inputs in (tensors, half):
        output = net(**inputs)
        assert output.dtype == (dtype or frozen)
        torch.testing.assert_close(output.float(), expected, atol=distance, rtol=0)


def test_legacy_keys_are_recognised_from_the_weights(tmp_path, caplog):
    legacy = write_release(tmp_path / "legacy", zero_keys=True, shards=2)
    assert DiT4SRTransformer.from_reference(legacy).variant.legacy_lr_keys
    assert not DiT4SRTransformer.from_reference(GOLDEN / "r1_dual").variant.legacy_lr_keys
    with pytest.raises(ValueError, match="every to_k_control is zero, so it was trained with legacy_lr_keys=True"):
        DiT4SRTransformer.from_reference(legacy, legacy_lr_keys=False)
    assert not caplog.messages
    DiT4SRTransformer.from_reference(GOLDEN / "q_dual", legacy_lr_keys=True)  # random keys: no release looks like it
    assert "to_k_control is not zero" in caplog.text


def test_an_untrained_stream_says_nothing_about_its_keys(base, tmp_path):
    write_released(base, DiT4SRTransformer(base).lr_stream, tmp_path)
    for given, runs_with in ((None, False), (False, False), (True, True)):
        assert DiT4SRTransformer.from_reference(tmp_path, given).variant.legacy_lr_keys is runs_with


def test_the_lr_stream_of_a_folder_is_read_without_its_base(tmp_path, monkeypatch):
    folder = write_release(tmp_path, frozen=HALF, zero_keys=True, shards=3)
    net = DiT4SRTransformer.from_reference(folder)
    monkeypatch.setattr(Release, "base", None)
    part = load_part(folder)
    expected = part_of(net, base_of(net, "stabilityai/stable-diffusion-3.5-medium"))
    assert part.base == expected.base and part.network_config == expected.network_config
    assert {name: tensor.dtype for name, tensor in part.state.items()} == dict.fromkeys(expected.state, HALF)
    assert all(torch.equal(part.state[name].float(), expected.state[name]) for name in expected.state)


def test_a_variant_that_the_reference_cannot_run_is_not_written(base, tmp_path):
    net = DiT4SRTransformer(base, Variant(lr_residual=False))
    with pytest.raises(ValueError, match="runs the full variant only"):
        write_released(base, net.lr_stream, tmp_path)
    assert not list(tmp_path.iterdir())


def test_released_folder_drops_dead_weights_and_nothing_else(tmp_path):
    folder = tmp_path / "transformer"
    shutil.copytree(GOLDEN / "r1_dual" / "transformer", folder)
    state = load_file(folder / WEIGHTS)
    dead = [name for name in state if any(unused in name for unused in UNUSED)]
    net = DiT4SRTransformer.from_reference(tmp_path)
    assert sum(p.numel() for p in net.parameters()) + net.base.pos_embed.pos_embed.numel() == sum(
        tensor.numel() for name, tensor in state.items() if name not in dead
    )

    state["transformer_blocks.0.attn.to_x_control.weight"] = state.pop("transformer_blocks.0.attn.to_q_control.weight")
    save_file(state, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"missing: blocks\.0\.attn\.q\.weight; unknown: .*to_x_control"):
        DiT4SRTransformer.from_reference(folder)
    state["transformer_blocks.0.attn.to_q_control.weight"] = state.pop("transformer_blocks.0.attn.to_x_control.weight")
    state["proj_out.bias"] = torch.zeros(3)
    save_file(state, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"of another shape: proj_out\.bias \(3,\) \(wanted \(\d+,\)\)$"):
        DiT4SRTransformer.from_reference(folder)


def test_released_folder_that_is_not_whole(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        DiT4SRTransformer.from_reference(tmp_path)
    shutil.copy(GOLDEN / "r1_dual" / "transformer" / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="missing"):
        DiT4SRTransformer.from_reference(tmp_path)
    whole = (GOLDEN / "r1_dual" / "transformer" / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        DiT4SRTransformer.from_reference(tmp_path)
