"""A frozen SD3 pipeline by its parts: each read from disk when a run first asks for it, through diffusers."""

from functools import cached_property
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from dit4sr_pl.embeddings import PromptCache
from dit4sr_pl.latents import LatentCoder
from dit4sr_pl.text import PromptEncoder

for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()  # a bar per part and file, for milliseconds each

SHIPPED = Path(__file__).parent / "weights"


class Backbone:
    """SD3, SD3.5 or tiny-sd3.

    Args:
        name: a folder in diffusers' layout, a hub id, or `tiny-sd3`, which is in this package.
        dtype: of the frozen weights: `float32`, `bfloat16` or `float16`.
        t5_tokens: tokens of T5 in the text stream.
        embeddings: folder of prompt embeddings (`prepare stage=embeddings`), with which text encoders and tokenizers
            are never read; None encodes prompts when they come.

    Raises (when a part is read):
        FileNotFoundError: nothing there, with what to do.
    """

    def __init__(self, name: str, dtype: str, t5_tokens: int, embeddings: str | None = None):
        self.name = name
        self.dtype = getattr(torch, dtype)
        self.t5_tokens = t5_tokens
        self.embeddings = embeddings
        self.device = torch.device("cpu")

    @property
    def location(self) -> str:
        shipped = SHIPPED / self.name
        return str(shipped) if shipped.is_dir() else self.name

    @cached_property
    def transformer(self) -> SD3Transformer2DModel:
        return self.read(SD3Transformer2DModel, subfolder="transformer", dtype=self.dtype).to(self.device)

    @cached_property
    def vae(self) -> AutoencoderKL | AutoencoderDC:
        return self.read(AutoModel, subfolder="vae", dtype=self.dtype).to(self.device)

    @cached_property
    def text_encoders(self) -> StableDiffusion3Pipeline:
        pipeline = self.read(StableDiffusion3Pipeline, transformer=None, vae=None, dtype=self.dtype)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.device)

    @cached_property
    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return self.read(FlowMatchEulerDiscreteScheduler, subfolder="scheduler")

    @cached_property
    def coder(self) -> LatentCoder:
        return LatentCoder(self.vae)

    @cached_property
    def prompts(self) -> PromptEncoder | PromptCache:
        if self.embeddings is not None:
            return PromptCache(self.embeddings, self.name, self.t5_tokens, self.dtype)
        return PromptEncoder(self.text_encoders, self.t5_tokens)

    def read(self, kind: type, **arguments):
        try:
            return kind.from_pretrained(self.location, **arguments)
        except (OSError, ValueError) as error:
            part = arguments.get("subfolder", "text encoders")
            reason = str(error).strip().splitlines()[0]
            raise FileNotFoundError(
                f"model.backbone.name={self.name}: its {part} cannot be read ({reason}). Give a folder in diffusers' "
                "layout, a hub id (for gated models accept the licence and run `hf auth login`), or tiny-sd3"
            ) from None

    def to(self, device: torch.device) -> None:
        """Moves what has been read, and later what is read; call it when the training device is known."""
        self.device = device
        for part in ("transformer", "vae", "text_encoders"):
            if part in vars(self):  # a cached property that has been asked for
                getattr(self, part).to(device)

    def __deepcopy__(self, memo: dict) -> "Backbone":
        return self  # Lightning's weight averaging copies the module around it: frozen weights exist once
