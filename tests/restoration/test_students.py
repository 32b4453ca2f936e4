"""How students restore: their own sigmas and start, and the scale of guidance as an input."""

from dataclasses import asdict, replace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from dit4sr_pl.backbone.autoencoder import draw_noise
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.common.run_identity import without_added
from dit4sr_pl.evaluation.methods.dit4sr import DiT4SR
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.model import DiT4SRTransformer, Student
from dit4sr_pl.model.compilation import CUDAGraphs
from dit4sr_pl.restoration.restorer import Restorer
from testing.student_files import STUDENTS, student_net, write_student
from testing.toy_runs import SAMPLER

GUIDED = replace(SAMPLER, guidance_scale=3.0, negative_prompt="a dog", added_prompt="sharp")
LR = enlarge(torch.rand(1, 3, 3, 3, generator=generator("cpu", "picture")), (16, 16))


@pytest.fixture(scope="module")
def nets(toy_backbone):
    return {name: student_net(toy_backbone, student) for name, student in STUDENTS.items()}


def restored(net, backbone, sampler) -> tuple[torch.Tensor, list[int]]:
    """Returns the restored image, and the number of sequences of every evaluation."""
    sizes = []
    hook = net.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    image = Restorer(net, backbone, sampler)(LR, (64, 64), ["a cat"], ["a"], 0)
    hook.remove()
    return image, sizes


@torch.no_grad()
def written_out(net, backbone, sigmas, from_lr=False, **options) -> torch.Tensor:
    """Returns what Euler steps between sigmas restore, with one sequence per evaluation."""
    prompt = backbone.prompts(["a cat sharp"], LR.device)
    lr_latent = backbone.coder.encode(enlarge(LR, (64, 64)))
    latent = lr_latent if from_lr else draw_noise(lr_latent.shape[1:], [generator("cpu", "restore", 0, "a")])
    for sigma, following in zip(sigmas, [*sigmas[1:], 0], strict=True):
        velocity = net(latent, lr_latent, torch.tensor([1000 * sigma]), *prompt, **options)
        latent = latent + (following - sigma) * velocity
    return backbone.coder.decode(latent).clamp(0, 1)


@pytest.mark.parametrize("name", ["4 steps", "1 step"])
def test_a_student_takes_its_own_steps_whatever_the_sampler_was(nets, toy_backbone, name):
    net, student = nets[name], STUDENTS[name]
    sampler = GUIDED.for_student(student)
    image, sizes = restored(net, toy_backbone, sampler)
    assert sizes == [1] * len(student.sigmas)
    expected = written_out(net, toy_backbone, student.sigmas, from_lr=student.start == "lr_latent")
    torch.testing.assert_close(image, expected, atol=1e-4, rtol=0)
    assert Restorer(net, toy_backbone, sampler).tile_evaluations((16, 16), (64, 64)) == len(student.sigmas)
    assert sampler.added_prompt == "sharp" and sampler.color == GUIDED.color  # what a student leaves free


def test_a_network_that_takes_the_scale_runs_one_sequence_per_evaluation(nets, toy_backbone):
    net, student = nets["guidance as input"], STUDENTS["guidance as input"]
    sampler = replace(GUIDED.for_student(student), sigmas=[1.0, 0.6, 0.3])
    image, sizes = restored(net, toy_backbone, sampler)
    assert sizes == [1, 1, 1] and (sampler.guidance, sampler.guidance_scale) == ("input", 3.0)
    expected = written_out(net, toy_backbone, [1.0, 0.6, 0.3], guidance=torch.tensor([3.0]))
    torch.testing.assert_close(image, expected, atol=1e-4, rtol=0)
    other, _ = restored(net, toy_backbone, replace(sampler, guidance_scale=1.0))
    assert not torch.allclose(other, image, atol=1e-4)  # at a scale of 1, too, it is an input
    assert sampler.tile_batcher(net).most == replace(SAMPLER, guidance_scale=1.0).tile_batcher(net).most


def test_graphs_replay_a_network_that_takes_the_scale(nets, toy_backbone):
    net, captured = nets["guidance as input"], []

    def capture(function, static):
        captured.append([tuple(tensor.shape) for tensor in static])
        output = function(*static)
        return lambda: output.copy_(function(*static)), output

    sampler = GUIDED.for_student(STUDENTS["guidance as input"])
    expected, _ = restored(net, toy_backbone, sampler)
    replayed = DiT4SRTransformer(net.base, lr_stream=net.lr_stream).eval()
    replayed.forward = CUDAGraphs(replayed.forward, capture)
    for scale, image in ((3.0, expected), (5.0, restored(net, toy_backbone, replace(sampler, guidance_scale=5.0))[0])):
        torch.testing.assert_close(
            restored(replayed, toy_backbone, replace(sampler, guidance_scale=scale))[0], image, atol=1e-5, rtol=0
        )
    assert len(captured) == 1 and captured[0][-1] == (1,)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("4 steps", {"steps": 5, "sigmas": None}, "steps=5: the network is a student (4 steps), for which steps is 4"),
        ("4 steps", {"sigmas": [1.0, 0.7, 0.4, 0.1]}, "for which sigmas is [1.0, 0.75, 0.5, 0.25]"),
        ("4 steps", {"start": "lr_latent"}, "start=lr_latent: the network is a student (4 steps), for which start"),
        ("4 steps", {"strength": 0.5}, "strength=0.5: the network"),
        ("4 steps", {"guidance_scale": 4.0}, "guidance_scale=4.0: the network is a student (4 steps), for which"),
        ("4 steps", {"guidance": "input"}, "guidance=input: the network is a student (4 steps)"),
        ("4 steps", {"negative_prompt": "a dog"}, "negative_prompt=a dog: the network is a student"),
        ("4 steps", {"guidance_sigma_min": 0.2}, "guidance_sigma_min=0.2: the network is a student"),
        ("4 steps", {"lr_shared": True}, "lr_shared=True: the network is a student"),
        (
            "4 steps",
            {"solver": DPMSolverMultistepScheduler.from_config},
            "solver=DPMSolverMultistepScheduler: the network is a student (4 steps), for which solver is 'euler'",
        ),
        (
            "1 step",
            {"start": "noise"},
            "start=noise: the network is a student (1 step), for which start is 'lr_latent'",
        ),
        ("guidance as input", {"guidance": "classifier_free"}, "is a student (guidance as input), for which guidance"),
        (
            "guidance built in",
            {"guidance_scale": 2.0},
            "is a student (guidance built in), for which guidance_scale is 1",
        ),
    ],
)
def test_settings_that_a_student_cannot_have_are_refused(nets, toy_backbone, name, options, message):
    sampler = GUIDED.for_student(STUDENTS[name])
    with pytest.raises(ValueError) as refused:
        Restorer(nets[name], toy_backbone, replace(sampler, **options))
    assert message in str(refused.value)


def test_a_teacher_cannot_take_the_scale_as_an_input(toy_backbone):
    with pytest.raises(ValueError, match="guidance=input: the network is a teacher, for which guidance is 'classifier"):
        Restorer(DiT4SRTransformer(toy_backbone.transformer), toy_backbone, replace(SAMPLER, guidance="input"))


@pytest.mark.parametrize("name", ["guidance as input", "guidance built in"])
def test_a_student_of_any_number_of_steps_leaves_steps_and_solver_free(nets, toy_backbone, name):
    sampler = GUIDED.for_student(STUDENTS[name])
    options = {"steps": 2, "start": "lr", "strength": 0.5, "solver": DPMSolverMultistepScheduler.from_config}
    Restorer(nets[name], toy_backbone, replace(sampler, **options))
    assert sampler.guidance_scale == (3.0 if name == "guidance as input" else 1.0)


def test_an_evaluation_is_of_the_student_and_of_the_settings_that_it_runs_with(toy_backbone, tmp_path):
    student = STUDENTS["4 steps"]
    path = write_student(tmp_path, toy_backbone, student)
    with pytest.raises(ValueError, match="is a student"):
        DiT4SR(None, path, toy_backbone, GUIDED, 0, "cpu").restorer  # noqa: B018
    method = DiT4SR(None, path, toy_backbone, GUIDED.for_student(student), 0, "cpu")
    assert (method.label, method.variant) == ("DiT4SR, 4 steps", "")
    assert method.network_config["student"] == student.as_dict() == method.identity["network"]["student"]
    assert method.identity["sampler"]["sigmas"] == (1.0, 0.75, 0.5, 0.25)
    assert "guidance" not in without_added(asdict(SAMPLER), "sampler.")
    ablated = write_student(tmp_path, toy_backbone, Student(sigmas=[0.5], start="lr_latent"), lr_residual=False)
    method = DiT4SR(None, ablated, toy_backbone, GUIDED, 0, "cpu")
    assert (method.label, method.variant) == ("DiT4SR, 1 step", "no_lr_residual")
