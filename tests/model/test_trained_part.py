import json
import math

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file

from dit4sr_pl.model import DiT4SRTransformer, SD3ControlNet, Variant, load_part, save_part
from dit4sr_pl.model.trained_part import (
    base_of,
    check_network_config,
    fingerprint,
    fit_part,
    part_of,
    with_injection_scale,
)
from testing.networks import randomise


def toy_part(net):
    return part_of(net, base_of(net, "toy"))


def test_file_round_trip(base, variant, tmp_path):
    net, other = DiT4SRTransformer(base, variant), DiT4SRTransformer(base, variant)
    randomise(net.lr_stream)
    path = tmp_path / "lr_stream.safetensors"
    save_part(toy_part(net), path)
    part = load_part(path)
    check_network_config(other, part.network_config, path)
    fit_part(other, part, path)
    assert part.base["name"] == "toy"
    torch.testing.assert_close(other.lr_stream.state_dict(), net.lr_stream.state_dict())
    assert [file.name for file in tmp_path.iterdir()] == ["lr_stream.safetensors"]


def test_bad_files_are_told_apart(base, tmp_path):
    path = tmp_path / "lr_stream.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_part(path)
    save_part(toy_part(DiT4SRTransformer(base)), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        load_part(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a trained part"):
        load_part(path)


def test_a_part_of_another_network_or_base_is_refused(base, tmp_path):
    net = DiT4SRTransformer(base)
    part = toy_part(net)
    with pytest.raises(ValueError, match=r"file: another architecture.*blocks\.0"):
        fit_part(SD3ControlNet(base, num_layers=1), part, "file")
    with pytest.raises(ValueError, match="file: trained as .*; this network is .*'lr_residual': False"):
        check_network_config(DiT4SRTransformer(base, Variant(lr_residual=False)), part.network_config, "file")
    with pytest.raises(ValueError, match="give model.network.variant.lr_residual=true for the same"):
        check_network_config(DiT4SRTransformer(base, Variant(lr_residual=False)), part.network_config, "file")
    scaled = DiT4SRTransformer(base, Variant(injection_scale=1.2))
    check_network_config(scaled, part.network_config, "file", may_differ=("injection_scale",))
    with pytest.raises(ValueError, match=r"trained as {'injection_scale': 1.0}; this network is {'injection_scale': 1"):
        check_network_config(scaled, part.network_config, "file")
    torch.manual_seed(3)
    other = DiT4SRTransformer(SD3Transformer2DModel.from_config(base.config))
    with pytest.raises(ValueError, match=r"file: trained over toy, and this base model has other weights"):
        fit_part(other, part, "file")


@pytest.mark.parametrize("scale, message", [("a", "must be a number"), (True, "a number"), (math.inf, "be finite")])
def test_a_factor_of_lr_injection_is_a_number_of_a_network_that_has_one(scale, message):
    full, without = (
        {"network": "dit4sr", "variant": Variant(lr_injection=name).as_dict()} for name in ("conv", "none")
    )
    assert with_injection_scale(full, 1.5, "file")["variant"] == Variant(injection_scale=1.5).as_dict()
    assert with_injection_scale(full, None, "file") == full
    with pytest.raises(ValueError, match=f"injection_scale={scale}: .*{message}"):
        with_injection_scale(full, scale, "file")
    for config in (without, {"network": "sd3_controlnet", "num_layers": 1}):
        with pytest.raises(ValueError, match="the network of file has no LR Injection"):
            with_injection_scale(config, 1.2, "file")


def test_fingerprint_depends_on_the_weights_and_not_on_their_precision(base):
    base.bfloat16()
    base.proj_out.weight.data[0, 0] = 2.0**-20  # half of its digits are lost in float16
    as_trained = fingerprint(base)
    assert fingerprint(base.half()) == fingerprint(base.float()) == as_trained
    base.proj_out.weight.data[0, 0] += 0.01
    assert fingerprint(base) != as_trained


def test_a_changed_byte_in_weights_or_header_is_noticed(base, tmp_path):
    path = tmp_path / "lr_stream.safetensors"
    net = DiT4SRTransformer(base)
    randomise(net.lr_stream)
    save_part(toy_part(net), path)
    data = path.read_bytes()
    scale = data.index(b'injection_scale\\": 1.0') + len(b'injection_scale\\": ')
    for at, message in ((len(data) - 3, "do not match the hash"), (scale, "do not match the hash")):
        path.write_bytes(data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :])
        with pytest.raises(ValueError, match=message):
            load_part(path)


def test_files_of_before_without_a_hash_are_read(base, tmp_path):
    path = tmp_path / "lr_stream.safetensors"
    part = toy_part(DiT4SRTransformer(base))
    header = {"settings": json.dumps(part.network_config), "base": json.dumps(part.base)}
    save_file(part.state, path, header)
    assert load_part(path).network_config == part.network_config
    save_file(part.state, path, header | {"settings": "{"})
    with pytest.raises(ValueError, match="lr_stream.safetensors: damaged .its header cannot be read"):
        load_part(path)
