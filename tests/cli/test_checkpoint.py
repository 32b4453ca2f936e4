"""What commands take over from the header of a checkpoint."""

import sys

import pytest
from omegaconf import OmegaConf
from PIL import Image

from dit4sr_pl import restore
from dit4sr_pl.cli.checkpoint import sampler_overrides
from dit4sr_pl.cli.command import read_conf
from dit4sr_pl.restoration.made_with import recorded
from testing.student_files import STUDENTS, write_student
from testing.toy_runs import TOY_SD3


def overrides(name: str | None, *given: str) -> list[str]:
    """Returns the overrides that a kind of student adds to a command with the user's."""
    values = dict(override.lstrip("+").partition("=")[::2] for override in given)
    student = None if name is None else STUDENTS[name].as_dict()
    return sampler_overrides(read_conf("restore", "input=x", *given), values, "a.safetensors", student)


def test_a_student_sets_what_it_fixes_and_leaves_the_rest():
    cfg = read_conf("restore", "input=x", *overrides("4 steps"), "sampler.color=none").sampler
    sampler = OmegaConf.to_container(cfg, resolve=True)
    assert sampler["sigmas"] == [1.0, 0.75, 0.5, 0.25] and sampler["solver"]["_target_"].endswith(
        "EulerDiscreteScheduler.from_config"
    )
    assert (sampler["steps"], sampler["start"], sampler["strength"], sampler["guidance_scale"]) == (4, "noise", 1, 1)
    assert (sampler["negative_prompt"], sampler["color"]) == ("", "none")
    assert "sampler.start=lr_latent" in overrides("1 step") and "sampler.sigmas=[0.5]" in overrides("1 step")
    scaled = overrides("guidance as input", "sampler.steps=7", "sampler/solver=dpm", "sampler.guidance_scale=5")
    assert "sampler.guidance=input" in scaled and "steps" not in str(scaled) and "scale" not in str(scaled)
    assert overrides(None, "sampler.steps=7", "sampler.start=lr") == []


def test_settings_that_are_the_students_own_may_be_given():
    given = ["sampler.steps=4", "sampler/solver=euler", "sampler.guidance_scale=1", "sampler.sigmas=[1,0.75,0.5,0.25]"]
    added = overrides("4 steps", *given, "sampler=tiny_sd3")
    assert "sampler.start=noise" in added
    assert not {override.partition("=")[0] for override in added} & {each.partition("=")[0] for each in given}


@pytest.mark.parametrize(
    ("name", "setting", "fixed"),
    [
        ("4 steps", "sampler.steps=20", "steps is 4"),
        ("4 steps", "sampler/solver=dpm", "solver is 'euler'"),
        ("4 steps", "+sampler.solver.shift=2", "solver is 'euler'"),
        ("4 steps", "sampler.sigmas=[1,0.5]", "sigmas is [1.0, 0.75, 0.5, 0.25]"),
        ("4 steps", "sampler.start=lr", "start is 'noise'"),
        ("4 steps", "sampler.strength=0.5", "strength is 1.0"),
        ("4 steps", "sampler.guidance_scale=4", "guidance_scale is 1.0"),
        ("4 steps", "sampler.negative_prompt=blurry, noisy", "negative_prompt is ''"),
        ("4 steps", "sampler.guidance_sigma_min=0.2", "guidance_sigma_min is 0.0"),
        ("4 steps", "sampler.guidance_sigma_max=0.8", "guidance_sigma_max is 1.0"),
        ("4 steps", "sampler.lr_shared=true", "lr_shared is False"),
        ("1 step", "sampler.start=noise", "start is 'lr_latent'"),
        ("guidance as input", "sampler.guidance=classifier_free", "guidance is 'input'"),
        ("guidance as input", "sampler.negative_prompt=blurry", "negative_prompt is ''"),
        ("guidance built in", "sampler.guidance_scale=4", "guidance_scale is 1.0"),
        (None, "sampler.guidance=input", "guidance is 'classifier_free'"),
    ],
)
def test_settings_that_a_checkpoint_cannot_have_are_refused_in_one_line(name, setting, fixed):
    what = "a teacher" if name is None else f"a student ({name})"
    with pytest.raises(ValueError) as refused:
        overrides(name, setting)
    line = (
        f"{setting.lstrip('+')}: a.safetensors is {what}, for which {fixed}; leave it out, or give another checkpoint"
    )
    assert str(refused.value) == line


def test_restoring_with_a_student_needs_nothing_else_and_records_how(toy_backbone, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (12, 10), "orange").save(tmp_path / "a.png")
    student = write_student(tmp_path, toy_backbone, STUDENTS["1 step"])
    command = ["restore", f"input={tmp_path / 'a.png'}", f"output={tmp_path / 'out'}", f"checkpoint={student}"]
    command += [f"model.backbone.name={TOY_SD3}", "sampler.smallest=1", "device=cpu"]
    monkeypatch.setattr(sys, "argv", [*command, "sampler.steps=3"])
    with pytest.raises(SystemExit) as end:
        restore.main()
    assert f"sampler.steps=3: {student} is a student (1 step), for which steps is 1" in str(end.value)
    monkeypatch.setattr(sys, "argv", command)
    restore.main()
    with Image.open(tmp_path / "out" / "a.png") as image:
        assert image.size == (48, 40)
    made_with = recorded(tmp_path / "out" / "a.png")
    assert (made_with["sampler.sigmas"], made_with["sampler.start"]) == ([0.5], "lr_latent")
    assert (made_with["sampler.steps"], made_with["sampler.guidance_scale"]) == (1, 1)
