import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from dit4sr_pl.backbone.flow import RectifiedFlow, TimestepDensity, interpolate
from dit4sr_pl.common.randomness import generator

SCHEDULER = FlowMatchEulerDiscreteScheduler(shift=3.0)


def test_one_euler_step_of_diffusers_along_the_true_velocity_ends_at_the_image():
    """The scheduler is the oracle of all signs: it samples with the same interpolation, velocity and timestep."""
    clean, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER.config)
    scheduler.set_timesteps(3)
    latent = interpolate(clean, noise, scheduler.sigmas[:1].expand(2))
    for timestep in scheduler.timesteps:
        latent = scheduler.step(noise - clean, timestep, latent).prev_sample
    torch.testing.assert_close(latent, clean, atol=1e-5, rtol=0)


def test_timesteps_are_the_schedulers_own_and_shifted_logit_normal():
    flow = RectifiedFlow(SCHEDULER, "released")
    timestep, sigma = flow.draw_timesteps([generator("cpu", 0, i) for i in range(4000)])
    torch.testing.assert_close(timestep, 1000 * sigma)
    # sigma = 3u / (1 + 2u) is monotone, so quantiles of u = sigmoid(normal) map onto quantiles of sigma
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    u = torch.distributions.Normal(0.0, 1.0).icdf(quantiles).sigmoid()
    torch.testing.assert_close(sigma.quantile(quantiles), 3 * u / (1 + 2 * u), atol=0.02, rtol=0)
    again, _ = flow.draw_timesteps([generator("cpu", 0, i) for i in (7, 3)])
    assert torch.equal(again, timestep[[7, 3]])


@pytest.mark.parametrize(
    "density",
    [
        TimestepDensity(),
        TimestepDensity("logit_normal", mean=-0.5, std=0.8),
        TimestepDensity("mode", scale=1.29),
        TimestepDensity("mode", scale=-0.5),
        TimestepDensity("uniform"),
    ],
    ids=str,
)
def test_densities_are_those_of_diffusers_draw_by_draw(density):
    ours = density.draw([generator("cpu", 0, i) for i in range(50)])
    options = density.name, 1, density.mean, density.std, density.scale
    theirs = [compute_density_for_timestep_sampling(*options, generator=generator("cpu", 0, i)) for i in range(50)]
    torch.testing.assert_close(ours, torch.cat(theirs), rtol=1e-6, atol=1e-7)
    assert ours.min() >= 0 and ours.max() <= 1


def test_cosmap_has_the_density_that_diffusers_weighs_uniform_draws_with():
    drawn = TimestepDensity("cosmap").draw([generator("cpu", 0, i) for i in range(4000)])
    grid = torch.linspace(0, 1, 1001)
    below = torch.cumulative_trapezoid(compute_loss_weighting_for_sd3("cosmap", grid), grid)
    for share in (0.1, 0.3, 0.5, 0.9):
        quantile = grid[1:][below >= share][0]
        assert (drawn < quantile).float().mean() == pytest.approx(share, abs=0.025)


@pytest.mark.parametrize("options", [{"name": "sigma_sqrt"}, {"std": 0.0}, {"scale": 1.8}, {"scale": -1.1}])
def test_densities_that_do_not_exist_are_refused(options):
    with pytest.raises(ValueError, match=f"model.timesteps.{next(iter(options))}="):
        TimestepDensity(**options)


@pytest.mark.parametrize("weighting", ["released", "velocity"])
def test_loss_is_zero_at_the_true_velocity_only(weighting):
    flow = RectifiedFlow(SCHEDULER, weighting)
    clean, noise, sigma = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 1.0])
    torch.testing.assert_close(flow.loss(noise - clean, clean, noise, sigma), torch.zeros(3), atol=1e-10, rtol=0)
    assert (flow.loss(noise, clean, noise, sigma) > 0.005).all()


def test_released_weighting_is_sigma_squared_times_the_velocity_loss():
    clean, noise, velocity = torch.randn(3, 3, 4, 8, 8).unbind()
    sigma = torch.tensor([0.1, 0.5, 1.0])
    released, plain = (RectifiedFlow(SCHEDULER, weighting) for weighting in ("released", "velocity"))
    expected = sigma**2 * plain.loss(velocity, clean, noise, sigma)
    torch.testing.assert_close(released.loss(velocity, clean, noise, sigma), expected)


def test_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match="choose one of released, velocity"):
        RectifiedFlow(SCHEDULER, "snr")


def test_the_timesteps_of_a_seed_stay_what_they_are():
    """A run that a later version resumes depends on these values."""
    flow = RectifiedFlow(SCHEDULER, "released")
    timestep, sigma = flow.draw_timesteps([generator("cpu", "flow", 0, position) for position in range(3)])
    torch.testing.assert_close(timestep, torch.tensor([821.8807, 636.9390, 612.4260]), atol=1e-3, rtol=0)
    torch.testing.assert_close(sigma, torch.tensor([0.8218807, 0.6369390, 0.6124260]), atol=1e-6, rtol=0)
