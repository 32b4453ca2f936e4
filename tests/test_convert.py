"""Released weights through the command, both ways, on the reference folders."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from dit4sr_pl.model import load_part
from dit4sr_pl.model.reference_format import WEIGHTS, read_released
from dit4sr_pl.model.trained_part import fit_part
from dit4sr_pl.restoration.restorer import build_network

GOLDEN = Path(__file__).parent / "golden"


def convert(cwd: Path, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dit4sr_pl.convert", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=200)


def test_a_release_becomes_an_lr_stream_file_and_a_release_again(tmp_path):
    result = convert(tmp_path, "release=dit4sr_q", f"input={GOLDEN / 'q_dual'}", "output=q.safetensors")
    assert result.returncode == 0, result.stderr
    part = load_part(tmp_path / "q.safetensors")
    assert part.network_config["variant"]["legacy_lr_keys"] and part.network_config["variant"]["injection_scale"] == 1.2
    assert part.base["name"] == "stabilityai/stable-diffusion-3.5-medium"

    base, _ = read_released(GOLDEN / "q_dual")
    net = build_network(base, part.network_config)
    fit_part(net, part, "q")
    tensors = load_file(GOLDEN / "q_dual" / "io.safetensors")
    expected = tensors.pop("output")
    with torch.no_grad():
        torch.testing.assert_close(net(**tensors), expected, atol=1e-5, rtol=0)

    base.save_pretrained(tmp_path / "sd3" / "transformer")
    (tmp_path / "sd3" / "model_index.json").write_text("{}")
    arguments = ["input=q.safetensors", "output=back", "model.backbone.name=./sd3", "model.backbone.dtype=float32"]
    result = convert(tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    theirs, ours = (load_file(f / "transformer" / WEIGHTS) for f in (GOLDEN / "q_dual", tmp_path / "back"))
    lr_stream = [name for name in theirs if "_control" in name]
    assert lr_stream and all(torch.equal(theirs[name], ours[name]) for name in lr_stream)


def test_mistakes_get_one_line(tmp_path):
    folder = GOLDEN / "q_dual"
    for arguments, message in (
        ([f"input={folder}", "output=x.safetensors"], "no value for release"),
        ([f"input={folder}", "output=x", "release=dit4sr_q"], "ends in .safetensors"),
        (["input=nowhere", "output=x"], "input=nowhere: no such file"),
        (["output=x"], "no value for input"),
    ):
        result = convert(tmp_path, *arguments)
        assert result.returncode == 1 and result.stderr.count("\n") == 1 and message in result.stderr, result.stderr
