import json
import math

import pytest
import torch

from dit4sr_pl.model import DiT4SRTransformer, LRStream, Student, Variant, load_part, save_part
from dit4sr_pl.model.trained_part import base_of, check_network_config, fit_part, part_of
from dit4sr_pl.restoration.restorer import build_network
from testing.networks import randomise

FOUR = Student(sigmas=(1.0, 0.9, 0.75, 0.5))
ONE = Student(sigmas=(0.5,), start="lr_latent")
SCALED = Student(guidance="input")


@pytest.mark.parametrize("student", [FOUR, ONE, SCALED])
def test_a_students_file_says_how_it_restores_and_its_network_is_made_of_it(base, student, tmp_path):
    net = DiT4SRTransformer(base, student=student)
    randomise(net.lr_stream)
    save_part(part_of(net, base_of(net, "toy")), tmp_path / "student.safetensors")
    part = load_part(tmp_path / "student.safetensors")
    assert Student.of(part.network_config) == student
    again = build_network(base, part.network_config)
    check_network_config(again, part.network_config, "file")
    fit_part(again, part, "file")
    assert again.student == again.lr_stream.student == student
    torch.testing.assert_close(again.lr_stream.state_dict(), net.lr_stream.state_dict())


def test_a_teachers_config_has_no_key_of_a_student(base):
    config = DiT4SRTransformer(base).network_config()
    assert config.keys() == {"network", "variant"} and Student.of(config) is None


def test_lists_of_files_and_configs_become_what_was_written():
    student = Student(**json.loads(json.dumps(FOUR.as_dict())))
    assert student == FOUR and student.as_dict()["sigmas"] == [1.0, 0.9, 0.75, 0.5]


def test_students_of_other_kinds_and_teachers_are_told_apart(base):
    four, teacher = DiT4SRTransformer(base, student=FOUR), DiT4SRTransformer(base)
    with pytest.raises(ValueError, match=r"file: trained as {'student.sigmas': \[0.5\], 'student.start': 'lr_latent'}"):
        check_network_config(
            four, {"network": "dit4sr", "variant": four.variant.as_dict(), "student": ONE.as_dict()}, "file"
        )
    with pytest.raises(ValueError, match="file: .*; this network is {.*'student.start': None}"):
        check_network_config(teacher, four.network_config(), "file")
    check_network_config(four, teacher.network_config(), "file", [f"student.{name}" for name in FOUR.as_dict()])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"start": "lr"}, "student: start='lr'; choose one of noise, lr_latent"),
        ({"guidance": "none"}, "student: guidance='none'; choose one of built_in, input"),
        ({"start": "lr_latent"}, "student: start=lr_latent needs sigmas"),
        ({"sigmas": []}, r"student: sigmas=\[\]; give decreasing numbers"),
        ({"sigmas": [1.0, 0.5, 0.5]}, "give decreasing numbers"),
        ({"sigmas": [1.0, 0.5, 0.0]}, "above 0"),
        ({"sigmas": [1.5, 0.5]}, "at most 1"),
        ({"sigmas": [1.0, math.nan]}, "give decreasing numbers"),
        ({"sigmas": 0.5}, "student: sigmas=0.5; give decreasing numbers"),
        ({"sigmas": ["one"]}, "give decreasing numbers"),
        ({"sigmas": [0.9, 0.5]}, "with start=noise the first one is 1"),
    ],
)
def test_what_no_student_can_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Student(**fields)


@torch.no_grad()
def test_a_fresh_student_that_takes_the_scale_equals_its_teacher_at_every_scale(base, inputs):
    teacher, student = DiT4SRTransformer(base), DiT4SRTransformer(base, student=SCALED)
    randomise(teacher.lr_stream)
    student.lr_stream.load_state_dict(teacher.lr_stream.state_dict(), strict=False)
    for scales in ([1.0, 1.0], [7.5, 2.0]):
        assert torch.equal(student(**inputs, guidance=torch.tensor(scales)), teacher(**inputs))
    randomise(student.lr_stream.guidance)
    low, high = (student(**inputs, guidance=torch.tensor(scales)) for scales in ([1.0, 4.0], [7.5, 4.0]))
    assert torch.equal(low[1], high[1]) and not torch.allclose(low[0], high[0], atol=1e-3)


def test_a_scale_is_given_to_networks_that_take_it_and_to_no_others(base, inputs):
    with pytest.raises(ValueError, match="takes the scale of guidance as an input; give guidance"):
        DiT4SRTransformer(base, student=SCALED)(**inputs)
    with pytest.raises(ValueError, match="does not take the scale of guidance as an input; leave guidance out"):
        DiT4SRTransformer(base)(**inputs, guidance=torch.ones(2))


def test_the_embedding_of_the_scale_is_a_small_share_of_the_lr_stream():
    with torch.device("meta"):
        streams = [LRStream(1536, [index < 13 for index in range(24)], Variant(), kind) for kind in (None, SCALED)]
    teacher, student = (sum(weight.numel() for weight in stream.parameters()) for stream in streams)
    assert teacher == 350_877_696 and student - teacher == (256 + 1) * 1536 + (1536 + 1) * 1536
