"""The network's velocity at one evaluation: guidance, prompts, and what is kept of the LR stream."""

from functools import lru_cache

import torch
from torch import Tensor

from dit4sr_pl.backbone.text_encoder import Embeddings, PromptEncoder
from dit4sr_pl.model import DiT4SRTransformer, LRCache
from dit4sr_pl.restoration.evaluations import Evaluation
from dit4sr_pl.restoration.sampler import Sampler
from dit4sr_pl.restoration.tiling import Place


class GuidedVelocity:
    """The velocity under classifier-free guidance, `v(negative) + scale * (v(prompt) - v(negative))`.

    Args:
        net: the whole network.
        sampler: how to restore.
        conditions: prompt embeddings and pooled ones, of one prompt per image; with guidance, those of the negative
            prompt after them.
    """

    def __init__(self, net: DiT4SRTransformer, sampler: Sampler, conditions: list[Embeddings]):
        self.net, self.sampler, self.conditions = net, sampler, conditions
        self.kept: dict[Place, LRCache] = {}  # of every tile
        self.latest: Evaluation | None = None
        self.prompts_of = lru_cache(maxsize=1)(self.stacked)  # without tiles all steps ask for the same

    @classmethod
    def of_captions(
        cls,
        net: DiT4SRTransformer,
        encode_prompts: PromptEncoder,
        sampler: Sampler,
        captions: list[str],
        device: torch.device,
    ) -> "GuidedVelocity":
        """Returns the velocity for captions, one per image, on the network's device."""
        conditions = [encode_prompts([sampler.prompt(caption) for caption in captions], device)]
        if sampler.runs_negative_prompt:
            conditions.append(encode_prompts([sampler.negative_prompt] * len(captions), device))
        return cls(net, sampler, conditions)

    def stacked(self, images: tuple[int, ...]) -> list[Tensor]:
        """Returns embeddings and pooled ones for tiles of these images, the negative prompt's last."""
        # A list as index would become a tensor on the CPU, and the host would wait for its copy.
        return [
            torch.stack([part[image] for part in parts for image in images])
            for parts in zip(*self.conditions, strict=True)
        ]

    def __call__(self, noisy: Tensor, lr: Tensor, places: list[Place], evaluation: Evaluation) -> Tensor:
        """Returns the velocity of noisy and LR tiles `(N, C, h, w)`, float32.

        Args:
            noisy: noisy latents.
            lr: LR latents.
            places: where each tile lies.
            evaluation: the evaluation that these tiles are a part of.
        """
        conditions = 2 if evaluation.guided else 1
        cache = self.cache(places, evaluation)
        prompts = [part[: conditions * len(places)] for part in self.prompts_of(tuple(image for image, *_ in places))]
        passes = conditions if self.sampler.lr_shared else 1
        velocities = [
            self.predict(noisy, lr, evaluation.timestep, *part, cache)
            for part in zip(*(part.chunk(passes) for part in prompts), strict=True)
        ]
        if evaluation.fresh and self.sampler.lr_refresh > 1:
            self.kept |= zip(places, cache.split(len(places)), strict=True)
        positive, *negative = torch.cat(velocities).chunk(conditions)
        return negative[0] + self.sampler.guidance_scale * (positive - negative[0]) if negative else positive

    def predict(
        self, noisy: Tensor, lr: Tensor, timestep: Tensor, embeds: Tensor, pooled: Tensor, cache: LRCache | None
    ) -> Tensor:
        """Returns the network's output, float32, for every tile under one condition after another."""
        noisy, lr = (latents.repeat(len(embeds) // len(latents), 1, 1, 1) for latents in (noisy, lr))
        noisy, lr, embeds, pooled = (tensor.to(self.net.base.dtype) for tensor in (noisy, lr, embeds, pooled))
        options = {} if cache is None else {"lr_cache": cache}  # a ControlNet knows none
        if self.sampler.guidance == "input":
            options["guidance"] = torch.full((len(noisy),), self.sampler.guidance_scale, device=noisy.device)
        return self.net(noisy, lr, timestep.expand(len(noisy)), embeds, pooled, **options).float()

    def cache(self, places: list[Place], evaluation: Evaluation) -> LRCache | None:
        """Returns the cache of a pass: an empty one where the LR stream runs, None where nothing needs it."""
        if evaluation is not self.latest and evaluation.fresh:
            self.kept.clear()
        self.latest = evaluation
        if not evaluation.fresh:
            return LRCache.join([self.kept[place] for place in places])
        keeps = self.sampler.lr_refresh > 1 or (self.sampler.lr_shared and evaluation.guided)
        return LRCache.empty(len(self.net.blocks)) if keeps else None
