"""DiT4SR (paper Figure 3): SD3's frozen transformer with an LR stream through every block."""

from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit4sr_pl.model.block import MMDiTControlBlock
from dit4sr_pl.model.lora import LoRA, adapted, merge_lora
from dit4sr_pl.model.lr_cache import LRCache
from dit4sr_pl.model.lr_stream import LRStream
from dit4sr_pl.model.reference_format import RELEASED_SCALE, Release, choose_lr_keys
from dit4sr_pl.model.student import Student
from dit4sr_pl.model.variant import Variant


class DiT4SRTransformer(nn.Module):
    """The network that predicts the velocity `v = eps - z_0` from a noisy latent and the LR image's latent.

    Args:
        base: diffusers' SD3 or SD3.5 transformer with its pretrained weights; frozen here.
        variant: which units of the LR stream the network has.
        gradient_checkpointing: whether every block is recomputed in the backward pass instead of keeping its
            activations.
        lr_stream: a trained LR stream, which brings its variant, its LoRA and what it is to its teacher; None: a new
            one.
        student: how the network restores, if it is a student; None: a teacher.
        lora: LoRA on the base; None: the base stays as it is.
    """

    trained_name = "lr_stream"  # attribute of what is trained, and its file's name

    def __init__(
        self,
        base: SD3Transformer2DModel,
        variant: Variant | None = None,
        gradient_checkpointing: bool = False,
        lr_stream: LRStream | None = None,
        student: Student | None = None,
        lora: LoRA | None = None,
    ):
        super().__init__()
        if hasattr(base, "original_fingerprint"):
            raise ValueError("the base is quantized already, and an LR stream starts from its original weights")
        if lr_stream is None:
            lr_stream = LRStream.over(base, variant or Variant(), student, lora)
            lr_stream.copy_output_projections_from(base)
        self.base = adapted(base.requires_grad_(False), lr_stream.lora)
        self.lr_stream = lr_stream
        self.variant, self.student = lr_stream.variant, lr_stream.student
        self.lora = None if lr_stream.lora is None else lr_stream.lora.lora
        self.gradient_checkpointing = gradient_checkpointing
        # base and lr_stream own the weights and the blocks pair them; FSDP finds its units among the submodules.
        self.blocks = nn.ModuleList(
            MMDiTControlBlock(frozen, lr, self.variant)
            for frozen, lr in zip(self.base.transformer_blocks, self.lr_stream.blocks, strict=True)
        )

    @classmethod
    def from_reference(
        cls,
        folder: str | Path,
        legacy_lr_keys: bool | None = None,
        injection_scale: float = RELEASED_SCALE,
        dtype: torch.dtype | None = None,
    ) -> "DiT4SRTransformer":
        """Loads a released DiT4SR.

        Args:
            folder: the released folder or its `transformer/`, with `config.json` and safetensors.
            legacy_lr_keys: True for `dit4sr_q` and `dit4sr_f`, False for `dit4sr_r1`; None: the weights decide.
            injection_scale: 1.2 in all releases.
            dtype: dtype of the whole network; None: that of the file's frozen weights.

        Raises:
            FileNotFoundError: the folder has no `config.json` or no weights.
            ValueError: the weights do not fit, which the message lists, or contradict `legacy_lr_keys`.
        """
        release = Release(folder)
        state, base = release.lr_state(), release.base(dtype)
        legacy_lr_keys = choose_lr_keys(state, legacy_lr_keys, release.folder)
        with torch.device("meta"):
            lr_stream = LRStream.over(base, Variant(legacy_lr_keys=legacy_lr_keys, injection_scale=injection_scale))
        lr_stream.load_state_dict(state, assign=True)
        # Files do not keep the memory format of convolutions.
        return cls(base, lr_stream=lr_stream.to(base.dtype, memory_format=torch.channels_last))

    @property
    def trained(self) -> LRStream:
        """The module that is trained and saved."""
        return self.lr_stream

    def network_config(self) -> dict:
        """Returns what a file of trained weights keeps of this network: its kind, its variant and, if it is a student,
        how it restores, and its LoRA."""
        student = {} if self.student is None else {"student": self.student.as_dict()}
        lora = {} if self.lora is None else {"lora": self.lora.as_dict()}
        return {"network": "dit4sr", "variant": self.variant.as_dict()} | student | lora

    def merge(self) -> None:
        """Merges LoRA into the base, then every `W^L W` into one matrix, for inference; see `LRStream.merge`."""
        self.merge_lora()
        self.lr_stream.merge(self.base)

    def merge_lora(self) -> None:
        """Merges LoRA into this network's base; other networks over the same base do not change."""
        merge_lora(self.base)
        self.lr_stream.lora = None

    @property
    def units(self) -> list[nn.Module]:
        """The modules that FSDP gathers one after another; each is called as a whole."""
        return list(self.blocks)

    @property
    def patch_size(self) -> int:
        """Latents per token along one side."""
        return self.base.config.patch_size

    def forward(
        self,
        noisy_latent: Tensor,
        lr_latent: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        lr_cache: LRCache | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Returns the velocity at `noisy_latent`, `(B, C, H, W)`.

        Latents and embeddings are brought to the base's dtype; the timestep keeps its own.

        Args:
            noisy_latent: scaled VAE latents, `(B, C, H, W)`; H and W are multiples of the patch size.
            lr_latent: latent of the LR image enlarged to the target size, of the same shape.
            timestep: `(B,)` in [0, 1000]; 1000 is pure noise.
            prompt_embeds: `(B, T, joint_attention_dim)`.
            pooled_prompt_embeds: `(B, pooled_projection_dim)`.
            lr_cache: if it is empty, this pass fills it; if it is full, it stands for the LR stream, which does not
                run. None: the LR stream runs, and nothing is kept.
            guidance: scale of guidance `(B,)`, for students that take it as an input; None: for all others.

        Raises:
            ValueError: the shapes do not fit each other or the patch size, or a scale is missing or cannot be taken.
        """
        grid = self.token_grid(noisy_latent, lr_latent)
        dtype = self.base.pos_embed.proj.weight.dtype
        # The embedding returns transposed tokens; all blocks would keep that layout, and every norm would copy them.
        noise = self.base.pos_embed(noisy_latent.to(dtype)).contiguous()
        lr = self.base.pos_embed(lr_latent.to(dtype)).contiguous()
        if lr_cache is not None and lr_cache.full:
            lr = lr[:, :0]  # no tokens
        text = self.base.context_embedder(prompt_embeds.to(dtype))
        time = self.base.time_text_embed(timestep, pooled_prompt_embeds.to(dtype))
        if (guidance is None) != (self.lr_stream.guidance is None):
            raise ValueError(
                "the network takes the scale of guidance as an input; give guidance"
                if guidance is None
                else "the network does not take the scale of guidance as an input; leave guidance out"
            )
        if guidance is not None:
            time = time + self.lr_stream.guidance(guidance).to(time.dtype)

        caches = [None] * len(self.blocks) if lr_cache is None else lr_cache.blocks
        for block, kept in zip(self.blocks, caches, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                noise, lr, text = checkpoint(block, noise, lr, text, time, grid, kept, use_reentrant=False)
            else:
                noise, lr, text = block(noise, lr, text, time, grid, kept)

        noise = self.base.proj_out(self.base.norm_out(noise, time))
        return self.unpatchify(noise, grid)

    def token_grid(self, noisy_latent: Tensor, lr_latent: Tensor) -> tuple[int, int]:
        """Returns the sides `(h, w)` of the token grid; raises ValueError for latents that do not fit."""
        height, width = noisy_latent.shape[-2:]
        if noisy_latent.shape != lr_latent.shape:
            shapes = f"{tuple(noisy_latent.shape)} and {tuple(lr_latent.shape)}"
            raise ValueError(f"noisy and LR latent must have one shape, got {shapes}")
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"latent {height}x{width}: sides must be multiples of the patch size {self.patch_size}")
        return height // self.patch_size, width // self.patch_size

    def unpatchify(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Puts tokens back into a latent, `(B, h*w, p*p*C) -> (B, C, h*p, w*p)`."""
        height, width = grid
        patches = tokens.unflatten(2, (self.patch_size, self.patch_size, -1)).unflatten(1, (height, width))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
