"""The student of few steps: what it learns, against the teacher's trajectory by a loop written out."""

from itertools import pairwise

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from dit4sr_pl.restoration.guided_velocity import GuidedVelocity
from dit4sr_pl.training.students.perceptual import crop_window, decoded
from dit4sr_pl.training.students.trajectories import average_velocities, teacher_sigmas
from testing.students import GUIDED, losses_of, make_student, toy_batch

EULER = ["sampler/solver@student.teaching.solver=euler", "student.teaching.steps=8"]


@pytest.fixture(scope="module")
def module(teacher):
    return make_student(teacher, "model=tiny_student_4", *EULER, *GUIDED)


@torch.no_grad()
def by_hand(module, batch) -> torch.Tensor:
    """Returns all states of the teacher's Euler steps with guidance, one sequence after another."""
    z, states, net = batch["noise"], [batch["noise"]], module.teacher.net
    times = torch.linspace(1, 0, 9)
    sigmas = 3 * times / (1 + 2 * times)
    for now, following in pairwise(sigmas):
        velocities = []
        for prompts in (batch["prompt"], ["blurry"] * len(z)):
            prompts = module.backbone.encoder(prompts, torch.device("cpu"))
            velocities.append(net(z, batch["lr_latent"], 1000 * now.expand(len(z)), *prompts))
        positive, negative = velocities
        z = z + (following - now) * (negative + 3 * (positive - negative))
        states.append(z)
    return torch.stack(states)


def test_the_teachers_steps_are_even_in_time_within_every_window_of_the_student():
    assert teacher_sigmas([1.0, 0.5], 4, shift=1.0) == [1.0, 0.75, 0.5, 0.25]
    assert teacher_sigmas([1.0, 0.2], 4, shift=1.0) == pytest.approx([1.0, 0.6, 0.2, 0.1])
    solver = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    solver.set_timesteps(20)  # of a thousand times, hence the tolerance
    ours = torch.tensor(teacher_sigmas([1.0, 0.9, 0.75, 0.5], 20, shift=3.0))
    torch.testing.assert_close(ours, solver.sigmas[:-1], atol=2e-3, rtol=0)


def test_what_it_learns_is_the_average_velocity_of_every_window(module):
    batch = toy_batch(module)
    expected = by_hand(module, batch)
    prompts = module.embeddings(batch)
    states = module.trajectory(batch["lr_latent"], batch["noise"], prompts)
    torch.testing.assert_close(states, expected[::2], atol=1e-4, rtol=1e-4)
    targets = average_velocities(states, module.sigmas).split(2)
    for window, (begin, end) in enumerate([(1.0, 0.9), (0.9, 0.75), (0.75, 0.5), (0.5, 0.0)]):
        torch.testing.assert_close(states[window] + (end - begin) * targets[window], states[window + 1])


@pytest.mark.slow
def test_a_few_steps_on_one_batch_lower_the_loss_to_a_fraction(teacher):
    module = make_student(teacher, "model=tiny_student_4", "student.teaching.steps=4", *GUIDED)
    losses = losses_of(module, toy_batch(module), 12, 3e-3)
    assert losses[-1] < 0.6 * losses[0]


@torch.no_grad()
def test_the_loss_of_the_velocities_that_the_teacher_has_on_average_is_zero(module, monkeypatch):
    batch = toy_batch(module)
    states = by_hand(module, batch)[::2]
    widths = torch.tensor([0.1, 0.15, 0.25, 0.5]).view(-1, 1, 1, 1, 1)
    average = ((states[:-1] - states[1:]) / widths).flatten(0, 1)
    given = []
    monkeypatch.setattr(module, "velocity", lambda *inputs: (given.extend(inputs), average + 1)[1])
    assert module.loss(batch).item() == pytest.approx(1.0, abs=1e-3)
    noisy, lr_latent, timestep, embeds, pooled = given
    torch.testing.assert_close(noisy, states[:-1].flatten(0, 1), atol=1e-4, rtol=1e-4)
    assert torch.equal(lr_latent, torch.cat([batch["lr_latent"]] * 4))
    torch.testing.assert_close(timestep, torch.tensor([1000.0, 1000, 900, 900, 750, 750, 500, 500]))
    assert torch.equal(embeds[:2], embeds[6:]) and not torch.equal(embeds[0], embeds[1])


@torch.no_grad()
def test_on_its_own_states_every_window_leads_from_where_the_student_is_to_the_teacher(module, monkeypatch):
    """A student that is wrong by 0.2 in its second window has arrived 0.03 from the teacher, and must lead back."""
    batch = toy_batch(module)
    states = by_hand(module, batch)[::2]
    widths, steps = [0.1, 0.15, 0.25, 0.5], iter(range(4))
    average = [(begin - end) / width for begin, end, width in zip(states, states[1:], widths, strict=False)]
    seen = []

    def slightly_wrong(noisy, lr_latent, timestep, *prompts):
        seen.append((noisy, timestep))
        step = next(steps)
        return average[step] + (0.2 if step == 1 else 0)

    monkeypatch.setattr(module, "velocity", slightly_wrong)
    monkeypatch.setattr(module, "on_own_states", True)
    off = [0, 0, -0.15 * 0.2, -0.15 * 0.2]
    errors = [0, 0.2, 0.15 * 0.2 / 0.25, 0.15 * 0.2 / 0.5]
    assert module.loss(batch).item() == pytest.approx(sum(error**2 for error in errors) / 4, rel=1e-2)
    for (noisy, timestep), state, shift, sigma in zip(seen, states, off, [1, 0.9, 0.75, 0.5], strict=False):
        torch.testing.assert_close(noisy, state + shift, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(timestep, torch.full((2,), 1000.0 * sigma))


@pytest.mark.slow
@pytest.mark.parametrize("own", ["true", "false"])
def test_the_perceptual_loss_compares_the_last_windows_result_with_the_teachers(teacher, own, monkeypatch):
    options = ["student.loss.perceptual=2", "student.crop=32", "student.teaching.steps=4"]
    module = make_student(teacher, "model=tiny_student_4", *options, f"student.on_own_states={own}", *GUIDED)
    batch, seen, parts = toy_batch(module), [], {}
    monkeypatch.setattr(module, "log", lambda name, part: parts.update({name: part.item()}))
    distance = module.perceptual.network
    monkeypatch.setattr(module.perceptual, "network", lambda *images: (seen.extend(images), distance(*images))[1])
    loss = module.loss(batch)
    assert loss.item() == pytest.approx(parts["train/velocity"] + 2 * parts["train/perceptual"], rel=1e-5)
    ours, taught = seen
    assert ours.shape == taught.shape == (2, 3, 32, 32) and parts["train/perceptual"] > 0
    assert ours.requires_grad and not taught.requires_grad
    states = module.trajectory(batch["lr_latent"], batch["noise"], module.embeddings(batch))
    crop = ..., *crop_window((8, 8), 4, module.seed, 0)
    torch.testing.assert_close(taught, module.backbone.coder.decode(states[-1][crop]))
    if own == "false":
        timestep = torch.full((2,), 500.0)
        velocity = module.net(states[3], batch["lr_latent"], timestep, *module.embeddings(batch))
        expected = decoded(module.backbone.coder, (states[3] - 0.5 * velocity)[crop])
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_steps_that_do_not_fill_the_windows_and_students_of_other_kinds_are_refused(teacher):
    for override, message in (
        ("student.teaching.steps=6", "student.teaching.steps=6: must be a multiple of the 4 windows"),
        ("student.loss.perceptual=-1", "student.loss.perceptual=-1; give a number of at least 0"),
        ("student.sigmas=null", "student.sigmas=None, student.start=noise: a student of trajectories has sigmas"),
    ):
        with pytest.raises(Exception, match=message):
            make_student(teacher, "model=tiny_student_4", override)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["heun", "dpm", "unipc"])
def test_states_at_the_students_sigmas_are_those_of_the_sampler_with_every_solver(teacher, solver):
    """The last state is what the sampler itself restores; those before are where its solver stands at these sigmas."""
    overrides = ["student.teaching.steps=8", f"sampler/solver@student.teaching.solver={solver}"]
    module = make_student(teacher, "model=tiny_student_4", *overrides, *GUIDED)
    batch = toy_batch(module)
    states = module.trajectory(batch["lr_latent"], batch["noise"], module.embeddings(batch))
    conditions = module.teacher.conditions(module.embeddings(batch), "blurry")
    velocity = GuidedVelocity(module.teacher.net, module.teaching, conditions)
    latents, at = batch["noise"], {}
    stepper, run = module.teaching.schedule(module.backbone.scheduler)
    for number, evaluation in zip(run, module.teaching.evaluations(stepper, run, torch.device("cpu")), strict=True):
        at.setdefault(round(float(stepper.sigmas[number]), 4), latents)
        if solver == "heun" and number % 2 == 0:  # the state that counts at a sigma is that after the correction
            at[round(float(stepper.sigmas[number]), 4)] = latents
        v = velocity(latents, batch["lr_latent"], [(image, (0, 8), (0, 8)) for image in range(2)], evaluation)
        latents = stepper.step(v, stepper.timesteps[number], latents).prev_sample
    expected = torch.stack([*(at[sigma] for sigma in (1.0, 0.9, 0.75, 0.5)), latents])
    torch.testing.assert_close(states, expected)
