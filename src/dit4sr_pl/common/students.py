"""The file of a student says how it samples: its label, and the sampler's settings that it fixes. No PyTorch."""

from collections.abc import Mapping
from typing import Any


def student_label(student: Mapping[str, Any]) -> str:
    """Returns what tells a student from its teacher in tables, such as `4 steps`.

    Args:
        student: the entry `student` of a network config.
    """
    if student["sigmas"] is not None:
        steps = len(student["sigmas"])
        return "1 step" if steps == 1 else f"{steps} steps"
    return "guidance as input" if student["guidance"] == "input" else "guidance built in"


def fixed_settings(student: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the sampler's settings, by name, that a network can have in one way only; the solver by its option.

    Args:
        student: the entry `student` of a network config; None: the network is a teacher.
    """
    if student is None:
        return {"guidance": "classifier_free"}
    built_in = {"guidance": "classifier_free", "guidance_scale": 1.0}  # at 1 there is no negative prompt
    fixed = {"guidance": "input"} if student["guidance"] == "input" else built_in
    fixed |= {"negative_prompt": "", "guidance_sigma_min": 0.0, "guidance_sigma_max": 1.0, "lr_shared": False}
    if student["sigmas"] is not None:
        sigmas = [float(sigma) for sigma in student["sigmas"]]
        fixed |= {"steps": len(sigmas), "sigmas": sigmas, "start": student["start"], "strength": 1.0, "solver": "euler"}
    return fixed


def refusal(setting: str, name: str, checkpoint: str, student: Mapping[str, Any] | None) -> str:
    """Returns the line for a setting that a network cannot have.

    Args:
        setting: the setting as it was given.
        name: its name in `fixed_settings`.
        checkpoint: the network's name.
        student: see `fixed_settings`.
    """
    what = "a teacher" if student is None else f"a student ({student_label(student)})"
    fixed = fixed_settings(student)[name]
    return f"{setting}: {checkpoint} is {what}, for which {name} is {fixed!r}; leave it out, or give another checkpoint"
