"""The name that a person gives to a file, or writes as a prompt, arrives as it is."""

import random

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from dit4sr_pl.cli.command import read_conf
from dit4sr_pl.cli.texts import for_hydra
from dit4sr_pl.images.files import write_image
from testing.stand_ins import Bicubic, command

NAMES = [
    "café",
    "photo (1)",
    "照片",
    "it's",
    "a,b",
    "2024",
    "true",
    "1e3",
    "[raw]",
    "x=y",
    "$",
    "{}",
    "${x}",
    "a${b",
    "%s",
]
NAMES += [
    "${oc.env:HOME}",
    "20240101_120000",
    "null",
    " a ",
    "~",
    "a:b",
    "lr=1e-3",
    "a\\",
    "\\${x}",
    "'",
    '"',
    "ein 'a' da",
    "#",
]


def arrives(argument: str, command: str = "restore") -> object:
    """Returns the value that a command's config has for an argument."""
    (argument,) = for_hydra([argument], command)
    override = OverridesParser.create().parse_override(argument)
    again = OverridesParser.create().parse_override(
        f"{argument.partition('=')[0]}={override.get_value_element_as_str()}"
    )
    assert again.value() == override.value()  # as Hydra hands it to the jobs of a sweep
    return OmegaConf.create({"value": override.value()}).value


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_a_path_and_a_text(name):
    assert arrives(f"input={name}") == arrives(f"prompt={name}x").removesuffix("x") == name


@pytest.mark.parametrize("seed", range(20))
def test_random_texts_arrive_as_they_are(seed):
    draw = random.Random(seed)
    text = "".join(draw.choices("ab ,'\"${}[]()=:#~!@%é\n1.", k=12))
    assert arrives(f"prompt=z{text}z") == f"z{text}z"  # begins and ends without a pair of quotes
    assert arrives(f"prompt=C:\\dir\\{text}z") == f"C:\\dir\\{text}z" or text[0] in " ,[](){}=:"  # Hydra's escapes


def test_values_that_were_quoted_or_escaped_for_hydra_stay_what_they_were():
    assert arrives("prompt='a, b'") == arrives('prompt="a, b"') == arrives(r"prompt=a\, b") == "a, b"
    assert arrives(r"prompt='it\'s'") == "it's"
    assert arrives("checkpoint=null") is None and arrives("prompt=") == ""


def test_a_file_goes_before_a_way_of_writing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("'a'", r"a\,b", "a,b", "c"):
        (tmp_path / name).touch()
        assert arrives(f"input={name}") == name
    assert arrives("data.folders=[a,b,c,d]") == ["a,b", "c", "d"]


@pytest.mark.parametrize(
    "given, arrived",
    [
        ("data.folders=[a b,it's,2024]", ["a b", "it's", "2024"]),
        ("data.folders=['a, b',c]", ["a, b", "c"]),
        ("data.folders=[]", []),
        ("data.folders=photos (1)", ["photos (1)"]),
        ("+data.sets.mine.folder=my photos, 2024", "my photos, 2024"),
        ("prompts=[a cat,'one, two']", ["a cat", "one, two"]),
        ("captions.dropped_words=[]", []),
    ],
)
def test_lists_and_named_sets_take_any_text(given, arrived):
    assert arrives(given) == arrived


def test_other_keys_keep_hydras_grammar():
    assert (
        arrives("scale=2.5") == 2.5
        and arrives("sampler.steps=3") == 3
        and arrives("metrics=[psnr,ssim]") == ["psnr", "ssim"]
    )
    options = ["-m", "seed=0,1", "--cfg", "job", "~callbacks.ema", "+ablation=full"]
    assert for_hydra(options, "train") == options


def test_sweeps_go_over_paths_that_are_not_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert for_hydra(["-m", "checkpoint=a b,c"], "evaluate") == ["-m", "checkpoint='a b','c'"]
    (tmp_path / "a b,c").touch()
    assert for_hydra(["-m", "checkpoint=a b,c"], "evaluate") == ["-m", "checkpoint='a b,c'"]
    assert for_hydra(["-m", "output=here/${seed}"], "train") == ["-m", "output=here/${seed}"]
    with pytest.raises(ValueError, match=r"output=\$\{oc.env:HOME\}: holds `\$\{`"):
        for_hydra(["-m", "output=${oc.env:HOME}"], "train")


def test_configs_that_are_handed_on_refuse_what_they_would_interpolate():
    with pytest.raises(ValueError, match=r"data.folders=\$\{oc.env:HOME\}: holds .* rename the file"):
        for_hydra(["data.folders=[${oc.env:HOME}]"], "train")


def test_python_reads_configs_with_the_same_paths():
    assert read_conf("restore", "input=photo (1).jpg", "output=a=b").input == "photo (1).jpg"


@pytest.mark.parametrize("name", ["café (1), it's [x=y]", "2024", "${oc.env:HOME}"])
def test_a_folder_of_any_name_is_restored_into_one(tmp_path, monkeypatch, capsys, name):
    import torch

    write_image(tmp_path / name / "in" / f"{name}.png", torch.rand(3, 16, 16))
    monkeypatch.chdir(tmp_path)
    restorer = Bicubic()
    arguments = [f"input={name}/in/{name}.png", f"output={name}/out", f"prompt={name}"]
    assert command(monkeypatch, restorer, *arguments) is None
    assert restorer.calls[0].captions == [name] and (tmp_path / name / "out" / f"{name}.png").is_file()
    assert capsys.readouterr().out.endswith(f"1 of 1 images restored into {name}/out\n")


def test_no_secret_stands_in_a_message(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret123")
    message = command(monkeypatch, Bicubic(), "input=in/${oc.env:HF_TOKEN}.png", f"output={tmp_path}")
    assert message == "error: input=in/${oc.env:HF_TOKEN}.png: no such file or folder"
