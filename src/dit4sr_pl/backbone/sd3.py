"""A frozen SD3 pipeline by its parts: each read from disk when a run first asks for it, through diffusers."""

from functools import cached_property

import diffusers
import torch
import transformers
from accelerate import cpu_offload
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn

from dit4sr_pl.backbone.autoencoder import LatentCoder
from dit4sr_pl.backbone.prompt_cache import PromptCache
from dit4sr_pl.backbone.text_encoder import PromptEncoder
from dit4sr_pl.common.files import ASSETS

for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()  # a bar per part and file, for milliseconds each


class TextEncoders(StableDiffusion3Pipeline):
    """SD3's, of which T5 may be left out."""

    _optional_components = [*StableDiffusion3Pipeline._optional_components, "text_encoder_3", "tokenizer_3"]


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
        self.device, self.offload = torch.device("cpu"), False

    @property
    def location(self) -> str:
        shipped = ASSETS / self.name
        return str(shipped) if shipped.is_dir() else self.name

    @cached_property
    def transformer(self) -> SD3Transformer2DModel:
        return self.read(SD3Transformer2DModel, subfolder="transformer", dtype=self.dtype).to(self.device)

    @cached_property
    def vae(self) -> AutoencoderKL | AutoencoderDC:
        return self.place(self.read(AutoModel, subfolder="vae", dtype=self.dtype))

    @cached_property
    def text_encoders(self) -> StableDiffusion3Pipeline:
        pipeline = self.read(TextEncoders, transformer=None, vae=None, dtype=self.dtype)
        pipeline.set_progress_bar_config(disable=True)
        if pipeline.text_encoder_3 is None:  # then diffusers puts zeros in T5's place, as wide as the transformer reads
            pipeline.register_modules(transformer=self.transformer)
        for encoder in encoders_of(pipeline):
            self.place(encoder)
        return pipeline

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

    def to(self, device: torch.device, offload: bool = False) -> None:
        """Moves what has been read, and later what is read; call it when the training device is known.

        With `offload` layers of the autoencoder and the text encoders are on the device only while they run.
        """
        self.device, self.offload = device, offload
        read = vars(self)  # a cached property is there once it has been asked for
        if "transformer" in read:
            self.transformer.to(device)
        if "vae" in read:
            self.place(self.vae)
        for encoder in encoders_of(self.text_encoders) if "text_encoders" in read else []:
            self.place(encoder)

    def place(self, model: nn.Module) -> nn.Module:
        return cpu_offload(model, self.device) if self.offload else model.to(self.device)

    def __deepcopy__(self, memo: dict) -> "Backbone":
        return self  # Lightning's weight averaging copies the module around it: frozen weights exist once


def encoders_of(pipeline: StableDiffusion3Pipeline) -> list[nn.Module]:
    encoders = pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3
    return [encoder for encoder in encoders if encoder is not None]  # T5 may be left out
