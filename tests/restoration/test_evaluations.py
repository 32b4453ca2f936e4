"""Evaluations that cost less: guidance in an interval, an LR stream that is kept, tiles side by side."""

from dataclasses import asdict, replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dit4sr_pl.backbone.autoencoder import draw_noise
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.common.run_identity import without_added
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.model import LRCache, SD3ControlNet
from dit4sr_pl.model.compilation import CUDAGraphs
from dit4sr_pl.restoration.evaluations import planned
from dit4sr_pl.restoration.restorer import Restorer
from dit4sr_pl.restoration.sampling import restore
from dit4sr_pl.restoration.tiling import TileBatcher
from testing.toy_runs import SAMPLER

GUIDED = replace(SAMPLER, steps=5, guidance_scale=3.0, negative_prompt="a dog")


@pytest.fixture
def run(net, tiny_backbone):
    def run(sampler, lr, most=None, seeds=(0, 1)):
        parts = net, tiny_backbone.coder, tiny_backbone.prompts, tiny_backbone.scheduler
        size, generators = tuple(4 * side for side in lr.shape[-2:]), [generator("cpu", seed) for seed in seeds]
        batcher = most and TileBatcher(most)
        return restore(*parts, sampler, lr, size, ["a cat"] * len(lr), generators[: len(lr)], batcher=batcher)

    return run


def picture(count: int, height: int, width: int) -> torch.Tensor:
    return enlarge(torch.rand(count, 3, 3, 3, generator=generator("cpu", "picture")), (height, width))


def kinds(**options) -> list[tuple]:
    sampler = replace(GUIDED, sigmas=[1.0, 0.8, 0.6, 0.4, 0.2], **options)
    return sampler.evaluations(*sampler.schedule(FlowMatchEulerDiscreteScheduler(shift=3.0)), torch.device("cpu"))


def test_the_lr_stream_runs_every_nth_evaluation_and_where_guidance_begins_or_ends():
    assert [each.fresh for each in kinds()] == [True] * 5 and all(each.guided for each in kinds())
    assert [each.fresh for each in kinds(lr_refresh=2)] == [True, False, True, False, True]
    interval = kinds(lr_refresh=4, guidance_sigma_min=0.4, guidance_sigma_max=0.8)
    assert [each.guided for each in interval] == [False, True, True, True, False]
    assert [each.fresh for each in interval] == [True, True, False, False, True]
    assert not any(each.guided for each in kinds(guidance_scale=1))


def test_tiles_are_shifted_when_the_lr_stream_runs_and_cover_the_square_evenly():
    assert {each.shift for each in kinds()} == {None}
    shifts = [each.shift for each in kinds(tiling="shifted", lr_refresh=2)]
    assert shifts[0] == shifts[1] == (0, 0) and shifts[2] == shifts[3] != shifts[4]
    many = planned([torch.zeros(())] * 64, [False] * 64, shifted=True)
    quarters = [tuple(int(4 * share) for share in each.shift) for each in many]
    assert all(2 <= quarters.count((row, column)) <= 6 for row in range(4) for column in range(4))


def written_out(net, backbone, lr, steps, velocity) -> torch.Tensor:
    """Returns what Euler steps along `velocity(number, latent, lr_latent, timestep)` restore."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    lr_latent = backbone.coder.encode(enlarge(lr, tuple(4 * side for side in lr.shape[-2:])))
    latent = draw_noise(lr_latent.shape[1:], [generator("cpu", 0)])
    scheduler.set_timesteps(steps)
    for number in range(steps):
        step = scheduler.sigmas[number + 1] - scheduler.sigmas[number]
        latent = latent + step * velocity(number, latent, lr_latent, scheduler.timesteps[number][None])
    return backbone.coder.decode(latent).clamp(0, 1)


@torch.no_grad()
def test_guidance_in_an_interval_equals_the_loop_written_out(run, net, tiny_backbone):
    lr = picture(1, 16, 16)
    cat, dog = (tiny_backbone.prompts([prompt], lr.device) for prompt in ("a cat", "a dog"))

    def velocity(number, latent, lr_latent, timestep):
        positive = net(latent, lr_latent, timestep, *cat)
        if number not in (1, 2, 3):  # their sigmas are 0.923, 0.819, 0.666; the others' are 1, 0.42
            return positive
        negative = net(latent, lr_latent, timestep, *dog)
        return negative + 3 * (positive - negative)

    sizes = []
    hook = net.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    restored = run(replace(GUIDED, guidance_sigma_min=0.5, guidance_sigma_max=0.95), lr)
    hook.remove()
    assert sizes == [1, 2, 2, 2, 1]
    torch.testing.assert_close(restored, written_out(net, tiny_backbone, lr, 5, velocity), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True], ids=["of each prompt", "of the prompt"])
def test_an_lr_stream_that_is_kept_equals_the_loop_written_out(run, net, tiny_backbone, shared):
    lr, caches = picture(1, 16, 16), {}
    prompts = {prompt: tiny_backbone.prompts([prompt], lr.device) for prompt in ("a cat", "a dog")}

    def velocity(number, latent, lr_latent, timestep):
        if number % 2 == 0:
            caches.clear()
        positive, negative = (
            net(
                latent,
                lr_latent,
                timestep,
                *prompts[prompt],
                lr_cache=caches.setdefault("a cat" if shared else prompt, LRCache.empty(len(net.blocks))),
            )
            for prompt in prompts
        )
        return negative + 3 * (positive - negative)

    sampler = replace(GUIDED, lr_refresh=2, lr_shared=shared)
    expected = written_out(net, tiny_backbone, lr, 5, velocity)
    torch.testing.assert_close(run(sampler, lr), expected, atol=1e-4, rtol=0)
    for other in (GUIDED, replace(GUIDED, lr_refresh=2, lr_shared=not shared)):
        assert not torch.allclose(run(other, lr), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("tiling", ["overlapping", "shifted"])
def test_what_is_kept_belongs_to_a_tile_and_not_to_its_batch(run, tiling):
    lr = picture(2, 8, 40) * torch.tensor([1.0, 0.5]).view(2, 1, 1, 1)
    sampler = replace(GUIDED, steps=4, tile=16, overlap=6, lr_refresh=2, tiling=tiling)
    together = run(sampler, lr, most=3)
    torch.testing.assert_close(together, run(sampler, lr, most=1), atol=1e-5, rtol=0)
    torch.testing.assert_close(together[1:], run(sampler, lr[1:], seeds=[1]), atol=1e-5, rtol=0)
    assert not torch.allclose(together, run(replace(sampler, lr_refresh=1), lr), atol=1e-4)


def test_tiles_that_do_not_fit_while_others_are_kept_change_nothing(run, net):
    lr, sampler, passes = picture(1, 8, 40), replace(SAMPLER, steps=4, tile=16, overlap=6, lr_refresh=2), []
    enough = run(sampler, lr, most=2)

    def small_memory(module, inputs):
        passes.append(len(inputs[0]))
        if len(passes) == 2:  # a pass that reads what was kept of two tiles
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = net.register_forward_pre_hook(small_memory)
    fewer = run(sampler, lr, most=2)
    hook.remove()
    assert passes == [2, 2, 1, 1, 1, 1, 1, 1]
    torch.testing.assert_close(fewer, enough, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{"lr_refresh": 2}, {"lr_shared": True}], ids=["lr_refresh", "lr_shared"])
def test_a_network_without_an_lr_stream_is_refused(tiny_backbone, options):
    with pytest.raises(ValueError, match="the checkpoint's network has no LR stream; leave both out"):
        Restorer(SD3ControlNet(tiny_backbone.transformer, 1), tiny_backbone, replace(SAMPLER, **options))


def test_cuda_graphs_are_refused(net, tiny_backbone, monkeypatch):
    monkeypatch.setattr(net, "forward", CUDAGraphs(net.forward, capture=lambda function, static: None))
    with pytest.raises(ValueError, match="CUDA graphs keep no LR stream; give cuda_graph=false"):
        Restorer(net, tiny_backbone, replace(SAMPLER, lr_refresh=2))


@pytest.mark.parametrize(
    "options, count",
    [
        ({}, 5 * 2 * 2),
        ({"guidance_sigma_max": 0.9}, 2 * 2 + 3 * 2 * 2),  # the sigmas are 1, 0.923, 0.819, 0.666, 0.42
        ({"guidance_sigma_max": 0.9, "sigmas": [1, 0.5, 0.2]}, 2 + 2 * 2 * 2),
        ({"guidance_scale": 1, "tiling": "shifted"}, 4 * 2 + 3),  # one shift cuts the image into three
    ],
)
def test_passes_are_counted_as_they_run(net, tiny_backbone, options, count):
    restorer = Restorer(net, tiny_backbone, replace(GUIDED, tile=16, overlap=6, **options))
    passes = []
    hook = net.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    restorer(picture(1, 16, 40), (64, 160), [""], ["a"], 0)
    hook.remove()
    assert restorer.tile_evaluations((16, 40), (64, 160)) == sum(passes) == count


def test_only_options_that_are_on_belong_to_an_evaluations_identity():
    off = without_added(asdict(SAMPLER), "sampler.")
    assert not {"guidance_sigma_min", "guidance_sigma_max", "lr_refresh", "lr_shared", "tiling"} & off.keys()
    on = {"guidance_sigma_min": 0.2, "guidance_sigma_max": 0.9, "lr_refresh": 2, "lr_shared": True, "tiling": "shifted"}
    assert without_added(asdict(replace(SAMPLER, **on)), "sampler.") == off | on
