"""Restoring (paper Section 5.1): steps along the flow, classifier-free guidance, tiles, colour alignment."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from dit4sr_pl.color import ALIGNMENTS
from dit4sr_pl.flow import interpolate
from dit4sr_pl.latents import LatentCoder, draw_noise, enlarge
from dit4sr_pl.model import DiT4SRTransformer
from dit4sr_pl.text import PromptEncoder
from dit4sr_pl.tiling import tiled

STARTS = ("noise", "lr")


@dataclass(frozen=True)
class Sampler:
    """How to restore; the paper's numbers are in `conf/sampler/paper.yaml`.

    Args:
        solver: from the base's scheduler config to a diffusers scheduler.
        steps: of the solver; a network evaluation each, and two with Heun.
        start: `noise`, or `lr`: the LR latent under as much noise as is left after the first steps, which are skipped.
        strength: of `start=lr`: share of the steps that is run, in 0..1.
        guidance_scale: of classifier-free guidance; at 1 the negative prompt is not run.
        added_prompt: appended to every caption. negative_prompt: what guidance leads away from.
        t5_tokens: tokens of T5 that commands which restore give to their backbone; training's validation takes its own.
        tile, overlap: in latents, for images larger than one tile.
        tile_batch: tiles in one forward pass, of one or of several images; guidance doubles them.
        smallest: latents per side; smaller images are extended by reflection, and their results cut.
        vae_tile: side of the autoencoder's tiles in latents, for images larger than one; they overlap by a quarter.
        color: alignment to the enlarged LR image: `adain`, `wavelet` or `none`.

    Raises:
        ValueError: for numbers that cannot be.
    """

    solver: Callable[..., SchedulerMixin]
    steps: int
    start: str
    strength: float
    guidance_scale: float
    added_prompt: str
    negative_prompt: str
    t5_tokens: int
    tile: int
    overlap: int
    tile_batch: int
    smallest: int
    vae_tile: int
    color: str

    def __post_init__(self) -> None:
        for name in ("steps", "tile_batch", "smallest"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampler: {name}={getattr(self, name)}; at least 1 is needed")
        for name, choices in (("start", STARTS), ("color", ALIGNMENTS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"sampler: {name}={getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if not 0 < self.strength <= 1:
            raise ValueError(f"sampler: strength={self.strength} must be above 0, and at most 1")
        if not 0 <= self.overlap < self.tile or self.tile % 2 or self.overlap % 2:
            raise ValueError(f"sampler: overlap={self.overlap} must be under tile={self.tile}, and both even")
        if self.vae_tile < 4 or self.vae_tile % 4:
            raise ValueError(f"sampler: vae_tile={self.vae_tile}; give a multiple of 4")

    def prompt(self, caption: str) -> str:
        return f"{caption} {self.added_prompt}".strip()

    def schedule(self, base: FlowMatchEulerDiscreteScheduler) -> tuple[SchedulerMixin, range]:
        """A solver with its timesteps, and the network evaluations that are run, numbered as its `sigmas`."""
        solver = self.solver(base.config)
        if "flow_shift" in solver.config:  # what some solvers call the base's `shift`
            solver.register_to_config(flow_shift=base.config.shift)
        solver.set_timesteps(self.steps)
        run = self.steps if self.start == "noise" else max(1, round(self.strength * self.steps))
        first = (self.steps - run) * solver.order
        solver.set_begin_index(first)
        return solver, range(first, len(solver.timesteps))


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
) -> Tensor:
    """Restores a batch of LR images of one size.

    Args:
        lr: `(B, 3, h, w)` in 0..1. size: of the result. captions: one per image, may be empty.
        generators: one CPU generator per image: a result does not depend on the batch around it.
        on_step: called after every network evaluation.

    Returns:
        `(B, 3, *size)` in 0..1, float32.
    """
    enlarged = enlarge(lr, size)
    with coder.tiles(sampler.vae_tile):
        lr_latent = coder.encode(extended(enlarged, sampler.smallest * coder.factor, net.patch_size * coder.factor))
    velocity = guided(net, encode_prompts, sampler, captions, lr.device)
    latent = sample(velocity, scheduler, sampler, lr_latent, draw_noise(lr_latent, generators), net.patch_size, on_step)
    with coder.tiles(sampler.vae_tile):
        sr = coder.decode(latent)[..., : size[0], : size[1]]
    return ALIGNMENTS[sampler.color](sr, enlarged).clamp_(0, 1)


def extended(images: Tensor, least: int, multiple: int) -> Tensor:
    """Extends images `(B, 3, H, W)` at the bottom and the right to a multiple, `least` or more, by reflection as often
    as it takes."""
    for dim in (2, 3):
        length = images.shape[dim]
        wanted = -(-max(length, least) // multiple) * multiple
        if wanted > length:
            there_and_back = max(2 * (length - 1), 1)
            position = torch.arange(wanted, device=images.device) % there_and_back
            images = images.index_select(dim, torch.minimum(position, there_and_back - position))
    return images


def guided(
    net: DiT4SRTransformer, encode_prompts: PromptEncoder, sampler: Sampler, captions: list[str], device: torch.device
) -> Callable[[Tensor, Tensor, list[int], Tensor], Tensor]:
    """Velocity under classifier-free guidance, `v(negative) + scale * (v(prompt) - v(negative))`, in float32.

    Returns:
        A function of noisy and LR tiles `(N, C, h, w)`, the image that each is of, and the timestep.
    """
    conditions = [encode_prompts([sampler.prompt(caption) for caption in captions], device)]
    if sampler.guidance_scale != 1:
        conditions.append(encode_prompts([sampler.negative_prompt] * len(captions), device))

    def velocity(noisy: Tensor, lr: Tensor, images: list[int], timestep: Tensor) -> Tensor:
        embeds, pooled = (torch.cat([part[images] for part in parts]) for parts in zip(*conditions, strict=True))
        noisy, lr = (latents.repeat(len(conditions), 1, 1, 1) for latents in (noisy, lr))
        noisy, lr, embeds, pooled = (tensor.to(net.base.dtype) for tensor in (noisy, lr, embeds, pooled))
        positive, *negative = net(noisy, lr, timestep.expand(len(noisy)), embeds, pooled).float().chunk(len(conditions))
        return negative[0] + sampler.guidance_scale * (positive - negative[0]) if negative else positive

    return velocity


def sample(
    velocity: Callable[[Tensor, Tensor, list[int], Tensor], Tensor],
    scheduler: FlowMatchEulerDiscreteScheduler,
    sampler: Sampler,
    lr_latent: Tensor,
    noise: Tensor,
    patch: int,
    on_step: Callable[[], None],
) -> Tensor:
    """From noise, or the noised LR latent, to the restored image's latent; all `(B, C, H, W)`, float32."""
    solver, evaluations = sampler.schedule(scheduler)
    latent = noise
    if sampler.start == "lr":
        latent = interpolate(lr_latent, noise, solver.sigmas[evaluations[0]].to(noise.device))
    for evaluation in evaluations:
        # Of the sigma: some of diffusers' solvers round their timesteps.
        timestep = solver.sigmas[evaluation].to(noise.device) * solver.config.num_train_timesteps
        predict = lambda *tiles, timestep=timestep: velocity(*tiles, timestep)  # noqa: E731
        v = tiled(predict, latent, lr_latent, sampler.tile, sampler.overlap, patch, sampler.tile_batch)
        latent = solver.step(v, solver.timesteps[evaluation], latent).prev_sample
        on_step()
    return latent
