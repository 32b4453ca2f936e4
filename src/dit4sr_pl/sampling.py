"""Restoring (paper Section 5.1): Euler steps along the flow, classifier-free guidance, tiles, colour alignment."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dit4sr_pl.color import ALIGNMENTS
from dit4sr_pl.latents import LatentCoder, draw_noise, enlarge
from dit4sr_pl.model import DiT4SRTransformer
from dit4sr_pl.text import PromptEncoder
from dit4sr_pl.tiling import tiled


@dataclass(frozen=True)
class Sampler:
    """How to restore; the paper's numbers are in `conf/sampler/paper.yaml`.

    Args:
        steps: Euler steps. guidance_scale: of classifier-free guidance; at 1 the negative prompt is not run.
        added_prompt: appended to every caption. negative_prompt: what guidance leads away from.
        tile, overlap: in latents, for images larger than one tile.
        color: alignment to the enlarged LR image: `adain`, `wavelet` or `none`.

    Raises:
        ValueError: for numbers that cannot be.
    """

    steps: int
    guidance_scale: float
    added_prompt: str
    negative_prompt: str
    tile: int
    overlap: int
    color: str

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampler: steps={self.steps}; at least 1 is needed")
        if not 0 <= self.overlap < self.tile:
            raise ValueError(f"sampler: overlap={self.overlap} must be under tile={self.tile}")
        if self.color not in ALIGNMENTS:
            raise ValueError(f"sampler: color={self.color!r}; choose one of {', '.join(ALIGNMENTS)}")

    def prompt(self, caption: str) -> str:
        return f"{caption} {self.added_prompt}".strip()


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
        on_step: called after every Euler step.

    Returns:
        `(B, 3, *size)` in 0..1, float32.
    """
    enlarged = enlarge(lr, size)
    lr_latent = coder.encode(pad_to_multiple(enlarged, coder.factor * net.patch_size))
    prompts = [sampler.prompt(caption) for caption in captions]
    embeds, pooled = encode_prompts(prompts, lr.device)
    guided = sampler.guidance_scale != 1
    if guided:
        negative_embeds, negative_pooled = encode_prompts([sampler.negative_prompt] * len(lr), lr.device)
        embeds, pooled = torch.cat([negative_embeds, embeds]), torch.cat([negative_pooled, pooled])

    dtype = net.base.dtype
    embeds, pooled = embeds.to(dtype), pooled.to(dtype)

    def velocity(noisy: Tensor, lr_latent: Tensor, timestep: Tensor) -> Tensor:
        noisy, lr_latent = noisy.to(dtype), lr_latent.to(dtype)  # between steps they stay in float32
        if not guided:
            return net(noisy, lr_latent, timestep.expand(len(noisy)), embeds, pooled)
        twice = timestep.expand(2 * len(noisy))
        negative, positive = net(torch.cat([noisy] * 2), torch.cat([lr_latent] * 2), twice, embeds, pooled).chunk(2)
        return negative + sampler.guidance_scale * (positive - negative)

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(sampler.steps, device=lr.device)
    latent = draw_noise(lr_latent, generators)
    for timestep in scheduler.timesteps:
        predict = lambda noisy, lr_tile, t=timestep: velocity(noisy, lr_tile, t).float()  # noqa: E731
        v = tiled(predict, latent, lr_latent, sampler.tile, sampler.overlap, net.patch_size)
        latent = scheduler.step(v, timestep, latent).prev_sample
        on_step()

    sr = coder.decode(latent)[..., : size[0], : size[1]]
    return ALIGNMENTS[sampler.color](sr, enlarged).clamp(0, 1)


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Extends images at the bottom and the right, by reflection where they are large enough for it."""
    height, width = images.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    mode = "reflect" if bottom < height and right < width else "replicate"
    return F.pad(images, (0, right, 0, bottom), mode=mode) if bottom or right else images
