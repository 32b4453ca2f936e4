"""The command that converts released weights, in both directions, on the reference folders."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file

from dit4sr_pl.model import load_part
from dit4sr_pl.model.reference_format import INDEX, WEIGHTS, Release
from dit4sr_pl.model.trained_part import fit_part
from dit4sr_pl.restoration.restorer import build_network
from testing.commands import call
from testing.releases import GOLDEN, write_release


@pytest.fixture
def convert(tmp_path):
    """A function that runs the command in `tmp_path` and returns the line that it ends with if it fails."""
    return functools.partial(call, "dit4sr_pl.convert", cwd=tmp_path)


@pytest.mark.parametrize(
    "zero_keys, others, runs_in",
    [
        (True, "dit4sr_r1", "test_wollava.py, which uses model_dit4sr:"),
        (False, "dit4sr_q", "test_wollava_r1.py, which uses model_dit4sr_r1:"),
    ],
)
def test_a_release_is_recognised_and_the_command_says_which_of_the_authors_scripts_runs_what_it_writes(
    convert, tmp_path, capsys, caplog, zero_keys, others, runs_in
):
    folder = write_release(tmp_path / "release", frozen=torch.bfloat16, zero_keys=zero_keys)
    assert convert("input=release", "output=ours.safetensors") is None
    part = load_part(tmp_path / "ours.safetensors")
    assert part.network_config["variant"]["legacy_lr_keys"] == zero_keys
    assert part.network_config["variant"]["injection_scale"] == 1.2
    Release(folder).base().save_pretrained(tmp_path / "sd3" / "transformer")
    (tmp_path / "sd3" / "model_index.json").write_text("{}")
    assert convert("input=ours.safetensors", "output=back", "model.backbone.name=./sd3") is None
    assert f"run it with the authors' test/{runs_in} --transformer_model" in capsys.readouterr().out

    end = convert(f"release={others}", "input=release", "output=wrong.safetensors")
    if zero_keys:
        assert end.startswith("error: ") and "every to_k_control is zero" in end and "\n" not in end
    else:
        assert end is None and "to_k_control is not zero" in caplog.text


def test_a_release_becomes_an_lr_stream_file_and_a_release_again(convert, tmp_path):
    assert convert("release=dit4sr_q", f"input={GOLDEN / 'q_dual'}", "output=q.safetensors") is None
    part = load_part(tmp_path / "q.safetensors")
    assert part.network_config["variant"]["legacy_lr_keys"] and part.network_config["variant"]["injection_scale"] == 1.2
    assert part.base["name"] == "stabilityai/stable-diffusion-3.5-medium"

    base = Release(GOLDEN / "q_dual").base()
    net = build_network(base, part.network_config)
    fit_part(net, part, "q")
    tensors = load_file(GOLDEN / "q_dual" / "io.safetensors")
    expected = tensors.pop("output")
    with torch.no_grad():
        torch.testing.assert_close(net(**tensors), expected, atol=1e-5, rtol=0)

    base.save_pretrained(tmp_path / "sd3" / "transformer")
    (tmp_path / "sd3" / "model_index.json").write_text("{}")
    arguments = ["input=q.safetensors", "output=back", "model.backbone.name=./sd3", "model.backbone.dtype=float32"]
    assert convert(*arguments) is None
    theirs, ours = (load_file(f / "transformer" / WEIGHTS) for f in (GOLDEN / "q_dual", tmp_path / "back"))
    lr_stream = [name for name in theirs if "_control" in name]
    assert lr_stream and all(torch.equal(theirs[name], ours[name]) for name in lr_stream)


def test_mistakes_get_one_line(convert):
    folder = GOLDEN / "q_dual"
    for arguments, message in (
        ([f"input={folder}", "output=x", "release=dit4sr_q"], "ends in .safetensors"),
        (["input=nowhere", "output=x"], "input=nowhere: no such file"),
        (["output=x"], "no value for input"),
    ):
        line = convert(*arguments)
        assert line.startswith("error: ") and message in line and "\n" not in line


def test_what_is_there_is_replaced_only_when_that_is_asked_for(convert, tmp_path):
    """Shards of former weights go with their index, which every reader would prefer; other files stay."""
    write_release(tmp_path / "release")
    assert convert("input=release", "output=ours.safetensors") is None
    assert convert("input=release", "output=ours.safetensors").startswith("error: ours.safetensors: exists; give")
    Release(tmp_path / "release").base().save_pretrained(tmp_path / "sd3" / "transformer")
    (tmp_path / "sd3" / "model_index.json").write_text("{}")
    folder = tmp_path / "back" / "transformer"
    folder.mkdir(parents=True)
    index = {"weight_map": {"a": "old-1.safetensors", "b": "old-2.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    for name in ("old-1.safetensors", "old-2.safetensors", "mine.safetensors"):
        (folder / name).write_text("")
    command = ["input=ours.safetensors", "output=back", "model.backbone.name=./sd3"]
    assert f"{INDEX}: exists; give another output, or overwrite=true" in convert(*command)
    assert len(list(folder.iterdir())) == 4
    assert convert(*command, "overwrite=true") is None
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", WEIGHTS, "mine.safetensors"]
    assert convert("input=back", "output=ours.safetensors", "overwrite=true") is None
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../../elsewhere"}}))
    assert "does not stay within its folder" in convert(*command, "overwrite=true")
