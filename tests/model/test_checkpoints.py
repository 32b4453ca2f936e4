import shutil
from pathlib import Path

import pytest
import torch
from conftest import randomise
from safetensors.torch import load_file, save_file

from dit4sr_pl.model import DiT4SRTransformer, load_lr_stream, save_lr_stream
from dit4sr_pl.model.checkpoints import WEIGHTS, fit_lr_stream

GOLDEN = Path(__file__).parents[1] / "golden"


def test_lr_stream_file_round_trip(base, variant, tmp_path):
    net, other = DiT4SRTransformer(base, variant), DiT4SRTransformer(base, variant)
    randomise(net.lr_stream)
    save_lr_stream(net.lr_stream, tmp_path / "lr_stream.safetensors")
    stored_variant, state = load_lr_stream(tmp_path / "lr_stream.safetensors")
    fit_lr_stream(other.lr_stream, state, "file")
    assert stored_variant == variant
    torch.testing.assert_close(other.lr_stream.state_dict(), net.lr_stream.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["lr_stream.safetensors"]


def test_bad_lr_stream_files_are_told_apart(base, tmp_path):
    path = tmp_path / "lr_stream.safetensors"
    with pytest.raises(FileNotFoundError, match="no such LR-stream file"):
        load_lr_stream(path)
    save_lr_stream(DiT4SRTransformer(base).lr_stream, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        load_lr_stream(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not an LR-stream file"):
        load_lr_stream(path)
    with pytest.raises(ValueError, match=r"another architecture.*blocks.0"):
        fit_lr_stream(DiT4SRTransformer(base).lr_stream, {"blocks.0.attn.k.weight": torch.zeros(2, 2)}, path)


def test_released_folder_drops_dead_weights_and_nothing_else(tmp_path):
    folder = tmp_path / "transformer"
    shutil.copytree(GOLDEN / "r1_dual" / "transformer", folder)
    state = load_file(folder / WEIGHTS)
    unused = (".attn2.add_", ".attn2.to_add_out", ".attn2.norm_added")
    dead = [name for name in state if any(part in name for part in unused)]
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
