"""Explicit sigmas, and the LR latent as the first noisy latent, against loops written out."""

from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hydra.utils import instantiate

from dit4sr_pl.cli.command import read_conf
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.common.run_identity import without_added
from dit4sr_pl.restoration.sampler import Sampler
from dit4sr_pl.restoration.sampling import states
from dit4sr_pl.restoration.tiling import TileBatcher
from testing.toy_runs import SAMPLER

BASE = FlowMatchEulerDiscreteScheduler(shift=3.0)
NOISE, LR_LATENT = torch.randn(2, 1, 2, 8, 8, generator=generator("cpu", "sigmas"))
SIGMAS = [1.0, 0.7, 0.45, 0.1]


def velocity(latent: torch.Tensor, lr: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return (latent * (1 + sigma)).sin() + sigma.cos() * lr


def restored(sampler: Sampler, scheduler=BASE) -> tuple[torch.Tensor, list[float]]:
    """Returns the latent that a sampler restores, and the sigmas that the network got."""
    seen = []

    def network(noisy, lr, places, evaluation):
        seen.append(evaluation.timestep.item() / 1000)
        return velocity(noisy, lr, evaluation.timestep / 1000)

    *_, latent = states(network, scheduler, sampler, LR_LATENT, NOISE, 2, TileBatcher(1))
    return latent, seen


def with_solver(name: str, **options) -> Sampler:
    solver = instantiate(read_conf("restore", "input=x", **{"sampler/solver": name}).sampler.solver)
    return replace(SAMPLER, solver=solver, **options)


def euler(latent: torch.Tensor) -> torch.Tensor:
    for sigma, following in zip(SIGMAS, [*SIGMAS[1:], 0], strict=True):
        latent = latent + (following - sigma) * velocity(latent, LR_LATENT, torch.tensor(sigma))
    return latent


def heun(latent: torch.Tensor) -> torch.Tensor:
    for sigma, following in zip(SIGMAS, [*SIGMAS[1:], 0], strict=True):
        slope = velocity(latent, LR_LATENT, torch.tensor(sigma))
        if following:
            ahead = latent + (following - sigma) * slope
            slope = (slope + velocity(ahead, LR_LATENT, torch.tensor(following))) / 2
        latent = latent + (following - sigma) * slope
    return latent


@pytest.mark.parametrize("written_out", [euler, heun])
def test_explicit_sigmas_equal_the_loop_written_out_and_are_not_shifted(written_out):
    latent, seen = restored(with_solver(written_out.__name__, sigmas=SIGMAS))
    torch.testing.assert_close(latent, written_out(NOISE), atol=1e-5, rtol=0)
    assert sorted(set(seen), reverse=True) == pytest.approx(SIGMAS)
    assert len(seen) == (4 if written_out is euler else 7)
    everything = restored(with_solver(written_out.__name__, sigmas=SIGMAS, start="lr", strength=0.5))
    assert everything[1][0] == pytest.approx(0.45)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm", "unipc"])
def test_explicit_sigmas_that_are_the_solvers_own_change_no_pixel(solver):
    sampler = with_solver(solver, steps=6)
    scheduler, _ = sampler.schedule(BASE)
    own = scheduler.sigmas[:-1].tolist()[:: scheduler.order]
    assert len(own) == 6
    for start in ("noise", "lr"):
        begun = replace(sampler, start=start, strength=0.5)
        expected, seen = restored(begun)
        latent, theirs = restored(replace(begun, sigmas=own))
        assert theirs == seen and torch.equal(latent, expected)
        assert not torch.equal(restored(replace(begun, sigmas=[0.9 * sigma for sigma in own]))[0], expected)


@pytest.mark.parametrize("solver", ["dpm", "unipc"])
def test_solvers_that_take_logarithms_begin_at_pure_noise_and_converge(solver):
    solution, _ = restored(replace(SAMPLER, steps=400))
    even = lambda count: [1 - number / count for number in range(count)]  # noqa: E731
    errors = [
        (restored(with_solver(solver, sigmas=even(count)))[0] - solution).abs().max().item() for count in (10, 40)
    ]
    assert errors[1] < errors[0] < 0.1 and errors[1] < 0.02


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm", "unipc"])
def test_one_step_from_the_lr_latent_subtracts_the_velocity_there(solver):
    latent, seen = restored(with_solver(solver, start="lr_latent", sigmas=[0.5]))
    assert seen == [pytest.approx(0.5)]
    expected = LR_LATENT - 0.5 * velocity(LR_LATENT, LR_LATENT, torch.tensor(0.5))
    torch.testing.assert_close(latent, expected, atol=1e-5, rtol=0)


def test_from_the_lr_latent_all_steps_are_run():
    latent, seen = restored(replace(SAMPLER, start="lr_latent", strength=0.5, sigmas=SIGMAS))
    assert len(seen) == 4
    torch.testing.assert_close(latent, euler(LR_LATENT), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "sigmas", [[], [0.5, 0.6], [0.5, 0.5], [1.1, 0.5], [0.5, 0], [0.5, -0.1], ["a"], [True], [float("nan")], "abc"]
)
def test_sigmas_that_cannot_be_are_refused(sigmas):
    with pytest.raises(ValueError, match="give a list of decreasing numbers, at most 1 and above 0, such as"):
        replace(SAMPLER, sigmas=sigmas)


def test_sigmas_decide_the_number_of_steps_until_another_number_is_asked_for():
    sampler = replace(SAMPLER, sigmas=[1, 0.5])
    assert (sampler.steps, sampler.sigmas) == (2, (1.0, 0.5))
    assert sampler.changed(color="none", steps=2).sigmas == (1.0, 0.5)
    fewer = sampler.changed(steps=1)
    assert (fewer.steps, fewer.sigmas) == (1, None)
    assert sampler.changed(steps=9, sigmas=[0.5]).sigmas == (0.5,)


def test_commands_take_sigmas_and_only_then_they_belong_to_an_evaluations_identity():
    sampler = instantiate(
        read_conf("restore", "input=x", "sampler.sigmas=[1,0.6,0.3]", "sampler.start=lr_latent").sampler
    )
    assert (sampler.sigmas, sampler.steps, sampler.start) == ((1.0, 0.6, 0.3), 3, "lr_latent")
    assert "sigmas" not in without_added(vars(SAMPLER), "sampler.")
    assert without_added(vars(sampler), "sampler.")["sigmas"] == (1.0, 0.6, 0.3)
