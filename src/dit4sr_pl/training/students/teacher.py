"""The teacher of a student: a frozen LR stream over the same base, and what a student learns from it."""

import torch
from torch import Tensor

from dit4sr_pl.backbone.fingerprints import check_parts
from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.backbone.text_encoder import Embeddings
from dit4sr_pl.common.hashing import weights_hash
from dit4sr_pl.model import load_part
from dit4sr_pl.model.checkpoint_files import checkpoint_file
from dit4sr_pl.model.compilation import compile_blocks
from dit4sr_pl.model.trained_part import fit_part
from dit4sr_pl.restoration.guided_velocity import GuidedVelocity
from dit4sr_pl.restoration.restorer import build_network
from dit4sr_pl.restoration.sampler import Sampler
from dit4sr_pl.restoration.sampling import states
from dit4sr_pl.restoration.tiling import TileBatcher


class Teacher:
    """A frozen network over a backbone's transformer, which its student's network shares.

    Its LR stream is merged and in the dtype of the frozen weights, so it takes a sixth of the base's memory.

    Args:
        backbone: the frozen pipeline.
        checkpoint: see `checkpoint_file`.
        compile: whether the network's blocks are compiled.

    Attributes:
        net: the network.
        weights_hash: hash of its weights, as in its file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something other than a teacher over this backbone.
    """

    def __init__(self, backbone: Backbone, checkpoint: str, compile: bool = False):
        part = load_part(checkpoint_file(checkpoint))
        if part.network_config["network"] != "dit4sr":
            kind = part.network_config["network"]
            raise ValueError(f"model.teacher={checkpoint}: a {kind}; students learn from an LR stream alone")
        if "student" in part.network_config:
            raise ValueError(f"model.teacher={checkpoint}: is a student itself; give the teacher that it learnt from")
        self.backbone = backbone
        self.net = build_network(backbone.transformer, part.network_config)
        fit_part(self.net, part, checkpoint)
        check_parts(backbone.name, backbone.parts, part.base.get("parts", {}), checkpoint)
        self.weights_hash = weights_hash(part.state)
        self.net.lr_stream.merge(self.net.base)  # before its float32 is rounded
        self.net.lr_stream.to(backbone.dtype).requires_grad_(False)
        self.negative: tuple[str, Embeddings] | None = None  # the negative prompt that came last
        if compile:
            compile_blocks(self.net)

    def to(self, device: torch.device) -> None:
        """Moves the LR stream to a device; the base moves with the backbone."""
        self.net.lr_stream.to(device)

    def __deepcopy__(self, memo: dict) -> "Teacher":
        return self  # Lightning's weight averaging copies the module around it; frozen weights exist once

    def conditions(self, prompts: Embeddings, negative_prompt: str) -> list[Embeddings]:
        """Returns the embeddings of prompts and, as many times, of a negative prompt."""
        count, device = len(prompts[0]), prompts[0].device
        if self.negative is None or self.negative[0] != negative_prompt:
            encode = getattr(self.backbone.prompts, "of_step", self.backbone.prompts)  # caches are exact anyway
            embeds, pooled = encode([negative_prompt], device)
            self.negative = negative_prompt, (embeds.to(self.backbone.dtype), pooled.to(self.backbone.dtype))
        embeds, pooled = self.negative[1]
        return [prompts, (embeds.expand(count, -1, -1), pooled.expand(count, -1))]

    @torch.no_grad()
    def states(self, sampler: Sampler, lr_latent: Tensor, noise: Tensor, conditions: list[Embeddings]) -> list[Tensor]:
        """Returns the latents `(B, C, h, w)` at the beginning of every step of a sampler, and the restored ones last.

        Args:
            sampler: how the teacher restores; latents go through in one piece, whatever its tiles are.
            lr_latent: LR latents `(B, C, h, w)`.
            noise: likewise.
            conditions: embeddings of the prompts and, with guidance, of the negative prompt, as `conditions` returns.
        """
        whole = sampler.changed(tile=max(sampler.tile, *noise.shape[-2:]))
        velocity = GuidedVelocity(self.net, whole, conditions)
        scheduler, batcher = self.backbone.scheduler, TileBatcher(len(noise))
        each = list(states(velocity, scheduler, whole, lr_latent, noise, self.net.patch_size, batcher))
        # A solver of order 2 evaluates twice within a step, except the last one.
        order = whole.schedule(scheduler)[0].order
        return [*each[:-1:order], each[-1]]

    @torch.no_grad()
    def guided(
        self, noisy: Tensor, lr_latent: Tensor, timestep: Tensor, conditions: list[Embeddings], scale: Tensor
    ) -> Tensor:
        """Returns `v(negative) + scale * (v(prompt) - v(negative))`, `(B, C, h, w)`, float32.

        Args:
            noisy: noisy latents `(B, C, h, w)`.
            lr_latent: LR latents, likewise.
            timestep: `(B,)` in [0, 1000].
            conditions: embeddings of the prompts and of the negative prompt.
            scale: `(B,)`.
        """
        twice = (torch.cat([each, each]) for each in (noisy, lr_latent, timestep))
        embeds, pooled = (torch.cat(pair) for pair in zip(*conditions, strict=True))
        positive, negative = self.net(*twice, embeds, pooled).float().chunk(2)
        return negative + scale.view(-1, 1, 1, 1) * (positive - negative)
