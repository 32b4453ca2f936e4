from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dit4sr_pl.latents import draw_noise, enlarge
from dit4sr_pl.model import DiT4SRTransformer
from dit4sr_pl.randomness import generator
from dit4sr_pl.sampling import Sampler, pad_to_multiple, restore

SAMPLER = Sampler(3, 1.0, "", "", tile=32, overlap=12, color="none")


@pytest.fixture(scope="module")
def net(tiny_backbone):
    net = DiT4SRTransformer(tiny_backbone.transformer)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.lr_stream.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net.eval()


@pytest.fixture
def run(net, tiny_backbone):
    def run(lr, size, sampler=SAMPLER, captions=None, seeds=None, net=net):
        generators = [generator("cpu", seed) for seed in seeds or range(len(lr))]
        parts = tiny_backbone.coder, tiny_backbone.prompts, tiny_backbone.scheduler
        return restore(net, *parts, sampler, lr, size, captions or [""] * len(lr), generators)

    return run


def picture(count: int, height: int, width: int) -> torch.Tensor:
    return enlarge(torch.rand(count, 3, 3, 3, generator=generator("cpu", "picture")), (height, width))


@torch.no_grad()
def test_equals_the_euler_loop_written_out(run, net, tiny_backbone):
    lr = picture(1, 16, 16)
    coder, scheduler = tiny_backbone.coder, FlowMatchEulerDiscreteScheduler(shift=3.0)
    embeds, pooled = tiny_backbone.prompts(["a cat"], lr.device)
    lr_latent = coder.encode(enlarge(lr, (64, 64)))
    latent = draw_noise(lr_latent, [generator("cpu", 0)])
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


@pytest.mark.parametrize("size", [(64, 64), (50, 71), (13, 90), (7, 5)])
def test_any_size_comes_out_exactly_and_in_range(run, size):
    sr = run(picture(1, 8, 9), size, replace(SAMPLER, color="adain"))
    assert sr.shape == (1, 3, *size) and sr.min() >= 0 and sr.max() <= 1


def test_large_images_go_through_the_window_in_tiles(run, net):
    windows = []
    hook = net.register_forward_pre_hook(lambda module, inputs: windows.append(tuple(inputs[0].shape[-2:])))
    run(picture(1, 16, 80), (64, 320), replace(SAMPLER, steps=1))
    hook.remove()
    assert windows == [(8, 32)] * 2


@pytest.mark.parametrize("height, width", [(16, 16), (17, 30), (1, 3)])
def test_padding_keeps_the_image_and_reaches_the_multiple(height, width):
    image = torch.rand(1, 3, height, width)
    padded = pad_to_multiple(image, 16)
    assert padded.shape[-2] % 16 == padded.shape[-1] % 16 == 0
    assert torch.equal(padded[..., :height, :width], image)


@pytest.mark.parametrize(
    "wrong, message", [({"steps": 0}, "steps=0"), ({"overlap": 32}, "overlap=32"), ({"color": "red"}, "choose one of")]
)
def test_numbers_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(SAMPLER, **wrong)


def test_caption_and_added_prompt_are_one_space_apart():
    sampler = replace(SAMPLER, added_prompt="sharp")
    assert sampler.prompt("a cat") == "a cat sharp" and sampler.prompt("") == "sharp"
