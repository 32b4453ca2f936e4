"""Restoring (paper Section 5.1): steps along the flow, classifier-free guidance, tiles, colour alignment."""

from collections.abc import Callable, Iterator

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dit4sr_pl.backbone.autoencoder import LatentCoder, draw_noise
from dit4sr_pl.backbone.flow import interpolate
from dit4sr_pl.backbone.text_encoder import PromptEncoder
from dit4sr_pl.model import DiT4SRTransformer
from dit4sr_pl.restoration.color import align
from dit4sr_pl.restoration.evaluations import Evaluation
from dit4sr_pl.restoration.fitting import enlarge_through, resize
from dit4sr_pl.restoration.guided_velocity import GuidedVelocity
from dit4sr_pl.restoration.sampler import Sampler
from dit4sr_pl.restoration.tiling import Place, TileBatcher, tiled


@torch.no_grad()
def restore(
    net: DiT4SRTransformer,
    coder: LatentCoder,
    encode_prompts: PromptEncoder,
    scheduler: FlowMatchEulerDiscreteScheduler,
    sampler: Sampler,
    lr: Tensor,
    size: tuple[int, int],
    captions: list[str],
    generators: list[torch.Generator],
    on_step: Callable[[], None] = lambda: None,
    device: torch.device | None = None,
    batcher: TileBatcher | None = None,
) -> Tensor:
    """Restores a batch of LR images of one size. A second image of the result's size is made only where the sampler
    restores at another one.

    Args:
        net: the whole network.
        coder: the autoencoder.
        encode_prompts: the text encoders.
        scheduler: the base's scheduler.
        sampler: how to restore.
        lr: `(B, 3, h, w)` in 0..1.
        size: height and width of the result.
        captions: one per image, may be empty.
        generators: one CPU generator per image, so that a result does not depend on the batch around it.
        on_step: called after every network evaluation.
        device: where latents and networks are; None: the device of `lr`.
        batcher: batcher of an earlier batch, which knows how many tiles fit; None: a new one.

    Returns:
        `(B, 3, *size)` in 0..1, float32, on the device of `lr`.

    Raises:
        ValueError: a single tile does not fit into the device's memory, or the network cannot keep its LR stream.
    """
    sampler.check_network(net)
    device = device or lr.device
    sizes, extent = sampler.fitted(tuple(lr.shape[-2:]), size, coder.factor, net.patch_size)
    height, width = sizes[-1]
    at_once = sampler.coded_at_once(extent, coder.factor)
    enlarged = (enlarge_through(images, sizes, extent) for images in lr.to(device).split(at_once))
    lr_latent = torch.cat([coder.encode_tiled(images, sampler.vae_tile) for images in enlarged])
    noise = draw_noise(lr_latent.shape[1:], generators).to(device)
    velocity = GuidedVelocity.of_captions(net, encode_prompts, sampler, captions, device)
    batcher = batcher or sampler.tile_batcher(net)
    passed = states(velocity, scheduler, sampler, lr_latent, noise, net.patch_size, batcher)
    latent = next(passed)
    for latent in passed:  # noqa: B007, since only the last one matters
        on_step()
    del lr_latent, noise, passed  # each latent takes a byte per pixel of the result
    # On the device, in the memory that tiles took before, colours are aligned at once; larger images go where `lr` is.
    result_bytes = lr.shape[0] * lr.shape[1] * height * width * torch.float32.itemsize
    place = device if result_bytes <= sampler.tile_memory * 2**30 / 2 else lr.device
    sr = torch.empty(*lr.shape[:2], height, width, device=place)
    for images, latents in zip(sr.split(at_once), latent.split(at_once), strict=True):
        top = 0
        for band in coder.decode_tiled(latents, sampler.vae_tile):
            rows = images[:, :, top : top + band.shape[2]]  # the last band may be cut
            rows.copy_(band[:, :, : rows.shape[2], :width])
            top += band.shape[2]
    aligned = align(sr, enlarge_through(lr.to(place), sizes), sampler.color, sampler.wavelet_levels)
    return resize(aligned.clamp_(0, 1), size).to(lr.device)


def states(
    velocity: Callable[[Tensor, Tensor, list[Place], Evaluation], Tensor],
    scheduler: FlowMatchEulerDiscreteScheduler,
    sampler: Sampler,
    lr_latent: Tensor,
    noise: Tensor,
    patch: int,
    batcher: TileBatcher,
) -> Iterator[Tensor]:
    """Yields the first noisy latents, which are noise, LR latents or a mixture, and then those after each evaluation
    of the network; all are `(B, C, H, W)`, float32."""
    solver, run = sampler.schedule(scheduler)
    latent = lr_latent if sampler.start == "lr_latent" else noise
    if sampler.start == "lr":
        latent = interpolate(lr_latent, noise, solver.sigmas[run[0]].to(noise.device))
    yield latent
    for number, evaluation in zip(run, sampler.evaluations(solver, run, noise.device), strict=True):
        predict = lambda *tiles, evaluation=evaluation: velocity(*tiles, evaluation)  # noqa: E731
        tiles = sampler.tile, sampler.overlap, patch, batcher, evaluation.shift
        v = tiled(predict, latent, lr_latent, *tiles)
        latent = solver.step(v, solver.timesteps[number], latent).prev_sample
        yield latent
