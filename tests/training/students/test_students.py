"""What all trainings of students share: one base, a teacher that stays what it is, files of the student alone."""

import copy

import pytest
import torch

from dit4sr_pl.model import DiT4SRTransformer, SD3ControlNet, Student, load_part, save_part
from dit4sr_pl.model.trained_part import base_of, part_of
from dit4sr_pl.restoration.restorer import build_network
from testing.students import GUIDED, make_student, toy_batch
from testing.toy_runs import TOY_SD3


@pytest.fixture(scope="module")
def module(teacher):
    return make_student(teacher, "model=tiny_student_4", *GUIDED)


def test_student_and_teacher_share_one_base_and_only_the_student_is_trained_and_saved(module):
    assert module.net.base is module.teacher.net.base is module.backbone.transformer
    assert all(name.startswith("lr_stream.blocks.") for name in module.state_dict())
    trained = {id(parameter) for parameter in module.parameters()}
    assert not trained & {id(parameter) for parameter in module.teacher.net.parameters()}
    assert not any(parameter.requires_grad for parameter in module.teacher.net.parameters())


def test_averaging_copies_the_student_and_neither_base_nor_teacher(module):
    copied = copy.deepcopy(module)
    assert copied.teacher is module.teacher and copied.net.base is module.net.base
    assert copied.lr_stream is not module.lr_stream and copied.net.lr_stream is copied.lr_stream


@torch.no_grad()
def test_a_student_starts_as_its_teacher_with_the_teachers_variant(module, teacher):
    assert module.net.variant == module.teacher.net.variant and module.net.variant.injection_scale == 1.2
    batch = toy_batch(module)
    inputs = batch["noise"], batch["lr_latent"], batch["timestep"], *module.embeddings(batch)
    torch.testing.assert_close(module.net(*inputs), module.teacher.net(*inputs), atol=1e-4, rtol=1e-4)
    unmerged = build_network(module.backbone.transformer, load_part(teacher).network_config)
    unmerged.lr_stream.load_state_dict(load_part(teacher).state)
    assert torch.equal(module.net(*inputs), unmerged(*inputs))


def test_prompts_are_those_of_restoring(teacher, monkeypatch):
    module = make_student(teacher, "model=tiny_student_4", "sampler.added_prompt=in detail")
    seen = []
    monkeypatch.setattr(module.backbone.encoder, "encode", lambda prompts, device: seen.extend(prompts) or TEXT)
    module.embeddings({"prompt": ["a cat"]})
    assert seen == ["a cat in detail"] == [module.restorer.sampler.prompt("a cat")]
    cached = copy.copy(module.step_inputs)
    object.__setattr__(cached, "cache", lambda prompts, device: (seen.clear(), seen.extend(prompts), *TEXT)[2:])
    cached({"position": torch.zeros(1, dtype=torch.long), "clean": torch.zeros(1, 4, 8, 8), "prompt": ["a dog"]})
    assert seen == ["a dog in detail"]


TEXT = torch.zeros(1, 85, 32), torch.zeros(1, 64)


def test_validations_restore_as_the_student_does(module):
    sampler = module.restorer.sampler
    assert sampler.sigmas == (1.0, 0.9, 0.75, 0.5) and module.restorer.evaluations == 4
    assert sampler.guidance_scale == 1 and module.teaching.guidance_scale == 3
    assert module.restorer.tile_evaluations((16, 16), (64, 64)) == 4


@pytest.mark.slow
def test_what_cannot_teach_is_refused_in_one_line(toy_backbone, teacher, tmp_path):
    base = toy_backbone.transformer
    for net, message in (
        (SD3ControlNet(base, 1), "a sd3_controlnet; students learn from an LR stream alone"),
        (DiT4SRTransformer(base, student=Student(sigmas=(1.0, 0.5))), "is a student itself"),
    ):
        save_part(part_of(net, base_of(net, str(TOY_SD3))), tmp_path / "file.safetensors")
        with pytest.raises(Exception, match=f"model.teacher={tmp_path / 'file.safetensors'}: .*{message}"):
            make_student(tmp_path / "file.safetensors", "model=tiny_student_4")
    with pytest.raises(Exception, match="tiny-dit4sr: trained over tiny-sd3, and this base model has other weights"):
        make_student("tiny-dit4sr", "model=tiny_student_4")


def test_a_student_can_start_from_another_student_of_the_same_teacher(teacher, module, tmp_path):
    path = tmp_path / "lr_stream.safetensors"
    part = part_of(module.net, module.trained_over)
    part.state["blocks.0.attn.out.bias"] += 1
    save_part(part, path)
    two = make_student(teacher, "model=tiny_student_4", f"model.checkpoint={path}", "student.sigmas=[1.0,0.5]")
    assert two.net.student.sigmas == (1.0, 0.5)
    assert torch.equal(two.lr_stream.blocks[0].attn.out.bias, part.state["blocks.0.attn.out.bias"])
    assert two.began_with != two.taught_by == module.taught_by


@torch.no_grad()
def test_a_student_with_lora_starts_as_its_teacher_too_and_the_teacher_runs_without_it(teacher):
    module = make_student(teacher, "model=tiny_student_4", "student.lora_rank=2")
    batch = toy_batch(module)
    inputs = batch["noise"], batch["lr_latent"], batch["timestep"], *module.embeddings(batch)
    taught = module.teacher.net(*inputs)
    torch.testing.assert_close(module.net(*inputs), taught, atol=1e-4, rtol=1e-4)
    lora = {name for name, _ in module.named_parameters() if name.startswith("lr_stream.lora.")}
    assert lora and module.net.network_config()["lora"]["rank"] == 2
    for name in lora:
        module.get_parameter(name).add_(0.3)
    assert torch.equal(module.teacher.net(*inputs), taught)
    assert not torch.allclose(module.net(*inputs), taught, atol=1e-2)
    copied = copy.deepcopy(module)
    assert copied.teacher is module.teacher and copied.net.base is not module.net.base
    assert torch.equal(copied.net(*inputs), module.net(*inputs))
