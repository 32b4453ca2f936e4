"""The student that takes the scale of guidance as an input: what it learns, against the sampler's guidance."""

from dataclasses import replace

import pytest
import torch

from dit4sr_pl.restoration.evaluations import Evaluation
from dit4sr_pl.restoration.guided_velocity import GuidedVelocity
from testing.students import losses_of, make_student, toy_batch

GUIDED = ["student.teaching.negative_prompt=blurry", "student.scales=[1,6]"]


@pytest.fixture(scope="module")
def module(teacher):
    return make_student(teacher, "experiment=tiny_guided_student", *GUIDED)


@torch.no_grad()
def test_what_it_learns_is_the_samplers_guided_velocity_at_every_images_scale(module):
    batch, net = toy_batch(module), module.teacher.net
    noisy, conditions = batch["noise"], module.teacher.conditions(module.embeddings(batch), "blurry")
    targets = module.teacher.guided(noisy, batch["lr_latent"], batch["timestep"], conditions, batch["scale"])
    for image, (scale, timestep) in enumerate(zip(batch["scale"], batch["timestep"], strict=True)):
        sampler = replace(module.teaching, guidance_scale=scale.item())
        velocity = GuidedVelocity(net, sampler, [(embeds[[image]], pooled[[image]]) for embeds, pooled in conditions])
        one = slice(image, image + 1)
        places = [(0, (0, 8), (0, 8))]
        expected = velocity(noisy[one], batch["lr_latent"][one], places, Evaluation(timestep, guided=True))
        torch.testing.assert_close(targets[one], expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(targets[0], targets[1])


@torch.no_grad()
def test_its_loss_is_zero_for_that_velocity_and_its_network_gets_the_scale(module, monkeypatch):
    batch, given = toy_batch(module), {}
    inputs = batch["lr_latent"], batch["timestep"]

    def perfect(noisy, lr_latent, timestep, *prompts, guidance):
        given["scale"] = guidance
        conditions = module.teacher.conditions(prompts, "blurry")
        return module.teacher.guided(noisy, *inputs, conditions, guidance)

    monkeypatch.setattr(module, "velocity", perfect)
    assert module.loss(batch).item() == pytest.approx(0, abs=1e-6)
    assert torch.equal(given["scale"], batch["scale"])


def test_scales_are_functions_of_seed_and_position_and_fill_their_range(module):
    batch = {"position": torch.arange(400), "clean": torch.zeros(400, 4, 2, 2), "prompt": [""] * 400}
    scales = module.step_inputs(batch)["scale"]
    part = module.step_inputs({name: values[100:200] for name, values in batch.items()})["scale"]
    assert torch.equal(part, scales[100:200])
    assert 1 <= scales.min() < 1.1 and 5.9 < scales.max() <= 6 and scales.mean().item() == pytest.approx(3.5, abs=0.2)


@pytest.mark.slow
def test_a_few_steps_on_one_batch_lower_the_loss_and_every_weight_is_trained(module):
    losses = losses_of(module, toy_batch(module), 12, 3e-3)
    assert losses[-1] < 0.6 * losses[0]
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert module.lr_stream.guidance.mlp.linear_2.weight.abs().max() > 0


@pytest.mark.parametrize(
    "override, message",
    [
        ("student.scales=[4,1]", r"student.scales=\[4, 1\]: give the smallest and the largest scale"),
        ("student.guidance=built_in", "student.guidance=built_in: a guided student has guidance=input"),
    ],
)
def test_what_a_guided_student_cannot_be_is_refused(teacher, override, message):
    with pytest.raises(Exception, match=message):
        make_student(teacher, "experiment=tiny_guided_student", override)
