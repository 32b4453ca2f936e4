"""A frozen SD3 pipeline by its components, each read from disk through diffusers when a run first asks for it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
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
from dit4sr_pl.backbone.fingerprints import TEXT_PARTS, part_fingerprints
from dit4sr_pl.backbone.prompt_cache import PromptCache
from dit4sr_pl.backbone.shipped_prompts import HeldPrompts, ShippedPrompts
from dit4sr_pl.backbone.text_encoder import PromptEncoder
from dit4sr_pl.common.files import ASSETS, is_shipped
from dit4sr_pl.common.hub import HubError, hub_errors, pipeline_folder
from dit4sr_pl.model.quantized import quantize
from dit4sr_pl.model.trained_part import fingerprint

log = logging.getLogger(__name__)


class TextEncoders(StableDiffusion3Pipeline):
    """SD3's pipeline with T5 as an optional component."""

    _optional_components = [*StableDiffusion3Pipeline._optional_components, "text_encoder_3", "tokenizer_3"]


class Backbone:
    """The frozen pipeline: SD3, SD3.5 or tiny-sd3.

    Args:
        name: a folder in diffusers' layout, a hub id, or `tiny-sd3`, which is in this package.
        dtype: dtype of the frozen weights: `float32`, `bfloat16` or `float16`.
        t5_tokens: number of T5's tokens in the text stream.
        embeddings: folder of prompt embeddings (`prepare stage=embeddings`), with which text encoders and tokenizers
            are never read; None: prompts are encoded when they come.
        gpu_memory: GiB of a GPU's memory that all components need when they are on it together; None: little.
        quantization: how `quantize` stores the base's weights: `int8`, `fp8` or `nf4`; None: as they are.

    Raises:
        FileNotFoundError: a component that a run asks for is not there; the message says what to do.
    """

    def __init__(
        self,
        name: str,
        dtype: str,
        t5_tokens: int,
        embeddings: str | None = None,
        gpu_memory: float | None = None,
        quantization: str | None = None,
    ):
        self.name = name
        self.dtype = getattr(torch, dtype)
        self.t5_tokens = t5_tokens
        self.embeddings = embeddings
        self.gpu_memory = gpu_memory
        self.quantization = quantization
        self.device, self.offload = torch.device("cpu"), False
        self.known: dict[str, str] = {}  # see `parts`

    @property
    def location(self) -> str:
        """Folder or hub id that diffusers reads."""
        return str(ASSETS / self.name) if is_shipped(self.name) else self.name

    @cached_property
    def transformer(self) -> SD3Transformer2DModel:
        """The base, on the device."""
        return self.read(SD3Transformer2DModel, subfolder="transformer", dtype=self.dtype).to(self.device)

    @cached_property
    def vae(self) -> AutoencoderKL | AutoencoderDC:
        """The autoencoder's weights."""
        return self.place(self.read(AutoModel, subfolder="vae", dtype=self.dtype))

    @cached_property
    def text_encoders(self) -> StableDiffusion3Pipeline:
        """A pipeline that holds the text encoders and tokenizers alone."""
        pipeline = self.read(TextEncoders, transformer=None, vae=None, dtype=self.dtype)
        pipeline.set_progress_bar_config(disable=True)
        if pipeline.text_encoder_3 is None:  # diffusers fills T5's place with zeros as wide as the transformer reads
            pipeline.register_modules(transformer=self.transformer)
        for encoder in encoders_of(pipeline):
            self.place(encoder)
        return pipeline

    @cached_property
    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """The base's scheduler, whose shifted table of sigmas training and sampling use."""
        return self.read(FlowMatchEulerDiscreteScheduler, subfolder="scheduler")

    @cached_property
    def coder(self) -> LatentCoder:
        """The autoencoder with SD3's scaling."""
        return LatentCoder(self.vae)

    @cached_property
    def encoder(self) -> PromptEncoder:
        """The text encoders with their memory."""
        return PromptEncoder(self.text_encoders, self.t5_tokens)

    @cached_property
    def prompts(self) -> PromptEncoder | PromptCache | HeldPrompts:
        """Encodes prompts, or reads their embeddings if the backbone was given some."""
        if self.embeddings is not None:
            encoders = text_parts(part_fingerprints(self.location))
            return PromptCache(self.embeddings, self.name, self.t5_tokens, self.dtype, encoders)
        return self.encoder

    def take_shipped_prompts(self, weights: Path) -> None:
        """Takes the prompt embeddings next to a set of weights, with which other prompts alone need text encoders.

        Embeddings that belong to something else are not taken, which a line says.

        Args:
            weights: a file, or a released folder.

        Raises:
            ValueError: the embeddings' file is damaged.
        """
        if self.embeddings is not None or (shipped := ShippedPrompts.beside(weights)) is None:
            return
        given = self.transformer, fingerprint(self.transformer), self.t5_tokens, self.dtype
        if why := shipped.mismatch(*given) or shipped.other_encoders(pipeline_folder(self.location)):
            log.warning("%s: not used, since it was %s; text encoders are read", shipped.path, why)
        else:
            self.prompts = HeldPrompts(shipped.held, lambda: self.encoder)

    @property
    def parts(self) -> dict[str, str]:
        """Fingerprints of the parts besides the transformer; with cached embeddings, of the encoders that made them."""
        self.known |= part_fingerprints(self.location, self.known)  # further parts may have been downloaded meanwhile
        if self.embeddings is None:
            return dict(self.known)
        return {part: each for part, each in self.known.items() if part not in TEXT_PARTS} | self.prompts.encoders

    def read(self, kind: type, **arguments):
        """Reads one component.

        Raises:
            FileNotFoundError: the component cannot be read; the message says what to do.
        """
        try:
            with hub_errors(f"model.backbone.name={self.name}", self.name), no_progress_bars():
                return kind.from_pretrained(self.location, **arguments)
        except HubError:
            raise
        except (OSError, ValueError) as error:
            component = arguments.get("subfolder", "text encoders")
            reason = str(error).strip().splitlines()[0]
            raise FileNotFoundError(
                f"model.backbone.name={self.name}: its {component} cannot be read ({reason}). Give a folder in "
                "diffusers' layout, a hub id (for gated models accept the licence and run `hf auth login`), or tiny-sd3"
            ) from None

    def to(self, device: torch.device, offload: bool | None = False) -> None:
        """Moves the components that have been read, and later ones when they are read, to a device.

        Call it when the training device is known.

        Args:
            device: where the components work.
            offload: whether the autoencoder's and the text encoders' layers are on the device only while they run;
                None: where the device's memory is smaller than `gpu_memory`.
        """
        self.device, self.offload = device, self.exceeds(device) if offload is None else offload
        read = vars(self)  # a cached property appears here after its first use
        if "transformer" in read:
            self.transformer.to(device)
        if "vae" in read:
            self.place(self.vae)
        for encoder in encoders_of(self.text_encoders) if "text_encoders" in read else []:
            self.place(encoder)

    def quantize(self, *adapted: SD3Transformer2DModel) -> None:
        """Stores the base's weights in fewer bits, if the config says so; networks are built and merged before.

        Args:
            adapted: the bases of networks, which share weights with this one; those with LoRA have some of their own.
        """
        bases = [base for base in {self.transformer, *adapted} if not hasattr(base, "original_fingerprint")]
        if self.quantization is not None and bases:
            original = fingerprint(self.transformer)
            quantize(bases, self.quantization)
            for base in bases:
                base.original_fingerprint = original

    def exceeds(self, device: torch.device) -> bool:
        """Returns whether all components together need more memory than a GPU has."""
        if device.type != "cuda" or self.gpu_memory is None:
            return False
        return torch.cuda.get_device_properties(device).total_memory < self.gpu_memory * 2**30

    def place(self, model: nn.Module) -> nn.Module:
        """Moves a component to the device, or hooks its layers if they are offloaded; earlier hooks are removed."""
        remove_hook_from_submodules(model)
        return cpu_offload(model, self.device) if self.offload else model.to(self.device)

    def __deepcopy__(self, memo: dict) -> "Backbone":
        return self  # Lightning's weight averaging copies the module around it; frozen weights exist once


def text_parts(parts: dict[str, str]) -> dict[str, str]:
    """Returns the fingerprints of text encoders and tokenizers among those of all parts."""
    return {part: fingerprint for part, fingerprint in parts.items() if part in TEXT_PARTS}


def encoders_of(pipeline: StableDiffusion3Pipeline) -> list[nn.Module]:
    """Returns the text encoders that a pipeline has."""
    encoders = pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3
    return [encoder for encoder in encoders if encoder is not None]  # T5 may be left out


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hides the progress bars of diffusers and transformers, one per component and file, while the context is open."""
    shown = [each.utils.logging for each in (diffusers, transformers) if each.utils.logging.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
