from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch._subclasses.fake_tensor import FakeTensorMode

from dit4sr_pl.backbone.autoencoder import draw_noise
from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.planning.step_cost import CostCounter
from dit4sr_pl.restoration.restorer import Restorer
from dit4sr_pl.restoration.sampling import restore, states
from dit4sr_pl.restoration.tiling import TileBatcher
from testing.toy_runs import SAMPLER


@pytest.fixture
def run(net, tiny_backbone):
    def run(lr, size, sampler=SAMPLER, captions=None, seeds=None, batcher=None):
        generators = [generator("cpu", seed) for seed in seeds or range(len(lr))]
        parts = tiny_backbone.coder, tiny_backbone.prompts, tiny_backbone.scheduler
        captions, batcher = captions or [""] * len(lr), batcher and TileBatcher(batcher)
        return restore(net, *parts, sampler, lr, size, captions, generators, batcher=batcher)

    return run


def picture(count: int, height: int, width: int) -> torch.Tensor:
    return enlarge(torch.rand(count, 3, 3, 3, generator=generator("cpu", "picture")), (height, width))


@torch.no_grad()
def test_equals_the_euler_loop_written_out(run, net, tiny_backbone):
    lr = picture(1, 16, 16)
    coder, scheduler = tiny_backbone.coder, FlowMatchEulerDiscreteScheduler(shift=3.0)
    embeds, pooled = tiny_backbone.prompts(["a cat"], lr.device)
    lr_latent = coder.encode(enlarge(lr, (64, 64)))
    latent = draw_noise(lr_latent.shape[1:], [generator("cpu", 0)])
    scheduler.set_timesteps(3)
    for timestep, sigma, following in zip(scheduler.timesteps, scheduler.sigmas, scheduler.sigmas[1:], strict=False):
        latent = latent + (following - sigma) * net(latent, lr_latent, timestep[None], embeds, pooled)
    torch.testing.assert_close(run(lr, (64, 64), captions=["a cat"]), coder.decode(latent), atol=1e-4, rtol=0)


def test_an_images_result_does_not_depend_on_its_batch(run):
    lr = picture(3, 16, 20)
    together = run(lr, (64, 80), seeds=[5, 6, 7])
    alone = run(lr[1:2], (64, 80), seeds=[6])
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=0)
    assert not torch.allclose(run(lr[1:2], (64, 80), seeds=[9]), alone, atol=1e-2)


def test_guidance_at_1_is_no_guidance_and_otherwise_extrapolates(run, net):
    lr, sizes = picture(1, 16, 16), []
    count = net.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    plain = run(lr, (64, 64), captions=["a cat"])
    guided = run(lr, (64, 64), replace(SAMPLER, guidance_scale=4.0, negative_prompt="a dog"), captions=["a cat"])
    same = run(lr, (64, 64), replace(SAMPLER, guidance_scale=4.0, negative_prompt="a cat"), captions=["a cat"])
    count.remove()
    assert sizes == [1] * 3 + [2] * 6
    torch.testing.assert_close(same, plain, atol=1e-3, rtol=0)
    assert not torch.equal(guided, plain)


@pytest.mark.parametrize("size", [(64, 64), (50, 71), (13, 90), (7, 5), (1, 1)])
def test_any_size_comes_out_exactly_and_in_range(run, size):
    sr = run(picture(1, 8, 9), size, replace(SAMPLER, color="adain"))
    assert sr.shape == (1, 3, *size) and sr.min() >= 0 and sr.max() <= 1


def test_large_images_go_through_the_window_in_tiles(run, net):
    windows = []
    hook = net.register_forward_pre_hook(lambda module, inputs: windows.append((len(inputs[0]), *inputs[0].shape[-2:])))
    run(picture(1, 16, 80), (64, 320), replace(SAMPLER, steps=1), batcher=1)
    hook.remove()
    assert windows == [(1, 8, 32)] * 2


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"steps": 0}, "steps=0"),
        ({"tile_memory": 0}, "tile_memory=0"),
        ({"start": "hr"}, "start='hr'; choose one of noise, lr"),
        ({"strength": 0}, "strength=0"),
        ({"vae_tile": 30}, "vae_tile=30"),
        ({"overlap": 32}, "overlap=32"),
        ({"color": "red"}, "choose one of"),
        ({"lr_refresh": 0}, "lr_refresh=0"),
        ({"tiling": "random"}, "tiling='random'; choose one of overlapping, shifted"),
        ({"guidance_sigma_min": 0.6, "guidance_sigma_max": 0.5}, "guidance_sigma_min=0.6, guidance_sigma_max=0.5"),
        ({"guidance_sigma_max": 1.5}, "guidance_sigma_max=1.5; give two numbers in 0..1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(SAMPLER, **wrong)


@pytest.mark.slow
@pytest.mark.parametrize("batcher", [1, 3])
def test_a_tiled_images_result_does_not_depend_on_batch_order_or_neighbours(run, batcher):
    lr = picture(3, 8, 24) * torch.tensor([1.0, 0.7, 0.4]).view(3, 1, 1, 1)  # two tiles each
    sampler = replace(SAMPLER, steps=2, tile=16, overlap=6, guidance_scale=3.0)
    captions, seeds = ["a cat", "a dog", ""], [5, 6, 7]
    together = run(lr, (32, 160), sampler, captions, seeds, batcher)
    turned = run(lr.flip(0), (32, 160), sampler, captions[::-1], seeds[::-1], batcher).flip(0)
    alone = run(lr[1:2], (32, 160), sampler, captions[1:2], seeds[1:2], batcher=8)
    torch.testing.assert_close(turned, together, atol=1e-5, rtol=0)
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)


def test_tiles_that_do_not_fit_are_fewer_from_then_on_with_one_warning(run, net, tiny_backbone, caplog):
    lr, sampler, sizes = picture(1, 8, 40), replace(SAMPLER, steps=2, tile=16, overlap=6), []  # four tiles

    def small_memory(module, inputs):
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory")

    restorer = Restorer(net, tiny_backbone, sampler)
    enough = restorer(lr, (32, 320), [""], ["a"], 0)
    with caplog.at_level("WARNING"):
        hook, fitting = net.register_forward_pre_hook(small_memory), 1
        fewer = restorer(lr, (32, 320), [""], ["a"], 0)
        again = restorer(lr, (32, 320), [""], ["a"], 0)
        fitting = 0
        with pytest.raises(ValueError, match="a single tile does not fit .* lower sampler.tile, "):
            restorer(lr, (32, 320), [""], ["a"], 0)
        hook.remove()
    assert sizes == [4, 2] + [1] * 4 * 2 * 2 + [1]
    (warning,) = caplog.records
    assert warning.message.startswith("4 tiles at once do not fit")
    torch.testing.assert_close(fewer, enough, atol=1e-5, rtol=0)
    assert torch.equal(again, fewer)


@pytest.mark.slow
def test_tiles_at_once_take_the_memory_that_the_sampler_gives_them(net):
    """The memory of all tensors that a forward pass makes is counted, at its peak."""
    with FakeTensorMode(allow_non_fake_inputs=True), CostCounter() as counter, torch.no_grad():
        latents, embeds, pooled = torch.empty(2, 16, 32, 32), torch.empty(2, 77 + 8, 64), torch.empty(2, 64)
        net(latents, latents, torch.empty(2), embeds, pooled)
    taken = counter.peak / 2**30  # of a tile with guidance
    for tiles, room in ((1, 0.1), (1, 1.5), (7, 10)):
        sampler = replace(SAMPLER, guidance_scale=2.0, tile_memory=room * taken)
        assert sampler.tile_batcher(net).most == tiles


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm", "unipc"])
def test_solvers_come_closer_to_the_solution_with_more_steps_and_count_their_evaluations(solver, tiny_backbone):
    """The flow has a known solution: dz/dsigma = z + cos(sigma)."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        sampler = instantiate(compose("restore", ["input=x", "sampler=tiny", f"sampler/solver={solver}"]).sampler)
    noise = torch.linspace(-1, 1, 64, dtype=torch.float32).view(1, 1, 8, 8)
    errors, counts = [], []
    for steps in (8, 32):
        calls = []

        def velocity(noisy, lr, places, evaluation, calls=calls):
            calls.append(evaluation.timestep)
            return noisy + (evaluation.timestep / 1000).cos()  # dz/dsigma = z + cos(sigma)

        sampler = replace(sampler, steps=steps)
        schedule, evaluations = sampler.schedule(tiny_backbone.scheduler)
        *_, result = states(velocity, tiny_backbone.scheduler, sampler, noise, noise, 2, TileBatcher(1))
        # z(0) for z(1) = noise: z(s) = c e^s + (sin s - cos s) / 2
        one = torch.ones(())
        expected = (noise - (one.sin() - one.cos()) / 2) / one.exp() - 0.5
        errors.append((result - expected).abs().max().item())
        counts.append(len(calls))
        assert len(evaluations) == len(calls) and calls[0] == pytest.approx(1000, abs=0.5)
        assert schedule.sigmas[1 if solver != "heun" else 2] < 1
    assert counts == ([15, 63] if solver == "heun" else [8, 32])
    assert errors[1] < errors[0] / (3 if solver == "euler" else 8)


@pytest.mark.parametrize("solver", ["dpm", "unipc"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_solvers_of_other_families_take_the_bases_shift(solver, shift):
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        sampler = instantiate(compose("restore", ["input=x", f"sampler/solver={solver}", "sampler.steps=7"]).sampler)
    base = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule, _ = sampler.schedule(base)
    first, last = (0.999, 0) if solver == "dpm" else (1, 0.001)  # either leaves out an end of the table
    even = [first + i / 7 * (last - first) for i in range(7)] + [0]
    assert schedule.sigmas.tolist() == pytest.approx([shift * s / (1 + (shift - 1) * s) for s in even], abs=2e-6)
    assert base.config.shift == shift and "flow_shift" not in base.config
    own = partial(sampler.solver, flow_shift=2 * shift)
    assert replace(sampler, solver=own).schedule(base)[0].config.flow_shift == 2 * shift
    assert sampler.schedule(UniPCMultistepScheduler(flow_shift=4.0))[0].config.flow_shift == 4


def test_starting_from_the_lr_latent_skips_the_first_steps_and_mixes_it_with_noise(tiny_backbone):
    sampler, seen = replace(SAMPLER, steps=10, start="lr", strength=0.3), []
    lr_latent, noise = torch.full((1, 1, 8, 8), 2.0), torch.full((1, 1, 8, 8), 1.0)

    def velocity(noisy, lr, places, evaluation):
        seen.append((noisy[0, 0, 0, 0].item(), evaluation.timestep.item() / 1000))
        return torch.zeros_like(noisy)

    list(states(velocity, tiny_backbone.scheduler, sampler, lr_latent, noise, 2, TileBatcher(1)))
    latent, sigma = seen[0]
    everything = FlowMatchEulerDiscreteScheduler(shift=3.0)
    everything.set_timesteps(10)
    assert len(seen) == 3 and sigma == pytest.approx(everything.sigmas[7].item())
    assert latent == pytest.approx((1 - sigma) * 2 + sigma * 1)


def test_small_images_are_extended_to_the_smallest_size_and_cut(run, net):
    windows = []
    hook = net.register_forward_pre_hook(lambda module, inputs: windows.append(tuple(inputs[0].shape[-2:])))
    sr = run(picture(1, 1, 1), (4, 4), replace(SAMPLER, steps=1, smallest=8))
    hook.remove()
    assert windows == [(8, 8)] and sr.shape == (1, 3, 4, 4)


def test_restoring_takes_its_own_number_of_t5_tokens_and_training_keeps_the_trainings():
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        restoring = compose("restore", ["input=x", "backbone=sd35_medium"])
        training = compose("train", ["experiment=paper", "output=x"])
        tiny = compose("restore", ["input=x"])
    tokens = [cfg.model.backbone.t5_tokens for cfg in (restoring, training, tiny)]
    assert tokens == [256, 77, 8]


def test_caption_and_added_prompt_are_one_space_apart():
    sampler = replace(SAMPLER, added_prompt="sharp")
    assert sampler.prompt("a cat") == "a cat sharp" and sampler.prompt("") == "sharp"
