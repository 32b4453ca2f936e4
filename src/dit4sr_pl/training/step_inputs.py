"""The inputs of a training step next to its images: draws, each a function of a sample's position, and embeddings."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dit4sr_pl.backbone.autoencoder import LatentCoder, draw_noise
from dit4sr_pl.backbone.flow import RectifiedFlow
from dit4sr_pl.backbone.prompt_cache import PromptCache
from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.common.randomness import generator


@dataclass(frozen=True)
class StepInputs:
    """A function that adds to a batch what its step needs. Workers call it, so that no step waits for it.

    Args:
        seed: seed of the run.
        flow: draws timesteps.
        coder: knows the shape of latents, and whether they have a posterior to sample.
        cache: prompt embeddings on disk; None: the step encodes prompts itself.
        prompt: function from a caption to the prompt of a step.
    """

    seed: int
    flow: RectifiedFlow
    coder: LatentCoder
    cache: PromptCache | None
    prompt: Callable[[str], str] = str  # which returns a caption as it is

    @classmethod
    def of(cls, backbone: Backbone, flow: RectifiedFlow, seed: int) -> "StepInputs":
        """Returns the inputs of steps over a backbone."""
        cache = backbone.prompts if backbone.embeddings is not None else None
        return cls(seed, flow, backbone.coder, cache)

    def __deepcopy__(self, memo: dict) -> "StepInputs":
        return self  # Lightning's weight averaging copies the module around it; frozen weights exist once

    def __call__(self, batch: dict) -> dict[str, Tensor]:
        """Returns, on the CPU, `timestep` and `sigma` `(B,)`, `noise` and, for a posterior, `posterior_noise`
        `(B, C, h, w)`; with a cache also `embeds` `(B, T, D_text)` and `pooled` `(B, D_pooled)`.

        Args:
            batch: has `position` `(B,)`, `hr` `(B, 3, H, W)` and `prompt`, or latents and embeddings in their places.
        """
        keys = [(self.seed, position) for position in batch["position"].tolist()]
        generators = [generator("cpu", "flow", *key) for key in keys]
        encoded = "clean" in batch
        latent = batch["clean"].shape[1:] if encoded else self.coder.latent_shape(tuple(batch["hr"].shape[-2:]))
        timestep, sigma = self.flow.draw_timesteps(generators)
        inputs = {"timestep": timestep, "sigma": sigma, "noise": draw_noise(latent, generators)}
        if self.coder.has_posterior and not encoded:
            inputs["posterior_noise"] = draw_noise(latent, [generator("cpu", "posterior", *key) for key in keys])
        if self.cache is not None and "embeds" not in batch:
            inputs["embeds"], inputs["pooled"] = self.cache(
                [self.prompt(caption) for caption in batch["prompt"]], torch.device("cpu")
            )
        return inputs
