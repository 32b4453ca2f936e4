import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit4sr_pl.model import DiT4SRTransformer, Variant
from dit4sr_pl.model.reference_format import WEIGHTS, write_released
from testing.networks import randomise

GOLDEN = Path(__file__).parents[1] / "golden"
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


def test_a_network_trained_here_comes_back_from_the_released_layout(base, inputs, tmp_path):
    net = DiT4SRTransformer(base)
    randomise(net.lr_stream)
    write_released(base, net.lr_stream, tmp_path)
    again = DiT4SRTransformer.from_reference(tmp_path, injection_scale=1.0)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs), net(**inputs), atol=0, rtol=0)


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
