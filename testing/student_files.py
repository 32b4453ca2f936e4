"""Students with random weights over a small backbone, of every kind."""

from pathlib import Path

from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.model import DiT4SRTransformer, Student, Variant, save_part
from dit4sr_pl.model.trained_part import base_of, part_of
from testing.networks import randomise

STUDENTS = {
    "4 steps": Student(sigmas=(1.0, 0.75, 0.5, 0.25)),
    "1 step": Student(sigmas=(0.5,), start="lr_latent"),
    "guidance as input": Student(guidance="input"),
    "guidance built in": Student(),
}


def student_net(backbone: Backbone, student: Student, **variant) -> DiT4SRTransformer:
    """Returns a student with random weights; `variant` are fields of `Variant`."""
    net = DiT4SRTransformer(backbone.transformer, Variant(**variant), student=student).eval()
    randomise(net.lr_stream)
    return net


def write_student(folder: Path, backbone: Backbone, student: Student, **variant) -> Path:
    """Writes such a student's LR-stream file into a folder, and returns the file."""
    net, path = student_net(backbone, student, **variant), folder / f"student{len(list(folder.iterdir()))}.safetensors"
    base = base_of(net, backbone.name) | {"parts": backbone.parts}
    save_part(part_of(net, base), path)
    return path
