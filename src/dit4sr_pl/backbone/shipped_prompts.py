"""Prompt embeddings that come with a set of weights, so that restoring without captions reads no text encoder.

They lie next to the weights in one file, in the layout of a cache's files (`prompt_cache`). Its header also names the
base and the text encoders, by fingerprints, and its tensors have the text encoders' dtype.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from safetensors import SafetensorError
from torch import Tensor

from dit4sr_pl.backbone.fingerprints import TEXT_PARTS, part_fingerprints
from dit4sr_pl.backbone.prompt_cache import damaged, embeddings_hash, open_file, prompt_key
from dit4sr_pl.backbone.text_encoder import Embeddings, PromptEncoder, gather
from dit4sr_pl.common.hub import PROMPTS

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
ADVICE = "delete it, and text encoders are read instead, or have `convert` write it again"


@dataclass(frozen=True)
class ShippedPrompts:
    """The embeddings in a file next to a set of weights, and what they belong to.

    Args:
        path: the file.
        fingerprint: fingerprint of the base.
        text_encoders: fingerprints of the text encoders and tokenizers that made them, by the components' names.
        t5_tokens: number of T5's tokens.
        held: embeddings `(1, T, D_text)` and pooled ones `(1, D_pooled)` by prompt, of which there is at least one.
    """

    path: Path
    fingerprint: str
    text_encoders: dict[str, str]
    t5_tokens: int
    held: dict[str, Embeddings]

    @classmethod
    def beside(cls, weights: Path) -> "ShippedPrompts | None":
        """Reads the file next to a file of weights, or in a folder of them; None: there is none.

        Raises:
            ValueError: the file is truncated or damaged.
        """
        if not weights.exists():  # a name of the hub, of which nothing lies in the current folder
            return None
        inside = weights.is_dir() and weights.name != "transformer"  # of a released folder
        path = (weights if inside else weights.parent) / PROMPTS
        return cls.read(path) if path.is_file() else None

    @classmethod
    def read(cls, path: Path) -> "ShippedPrompts":
        """Reads a file; raises ValueError if it is truncated, damaged or of another kind."""
        file, header = open_file(path, ADVICE)
        held = {}
        try:
            for key, prompt in header["prompts"].items():
                embeds, pooled = file.get_tensor(f"{key}.embeds"), file.get_tensor(f"{key}.pooled")
                if header["hashes"][key] != embeddings_hash(embeds, pooled) or prompt_key(prompt) != key:
                    raise damaged(path, f"the embeddings of {prompt!r} have another hash", ADVICE)
                held[prompt] = embeds[None], pooled[None]
            names = header["fingerprint"], header["text_encoders"] | {}, header["t5_tokens"]
            if not held or {(embeds.ndim, pooled.ndim) for embeds, pooled in held.values()} != {(3, 2)}:
                raise damaged(path, "it holds no embeddings", ADVICE)
        except (SafetensorError, KeyError, TypeError, AttributeError) as error:
            raise damaged(path, error, ADVICE) from None
        return cls(path, *names, held)

    def mismatch(self, transformer: SD3Transformer2DModel, fingerprint: str, t5_tokens: int, dtype: torch.dtype) -> str:
        """Returns why the embeddings are not those that a pipeline's text encoders would give; empty: they are.

        Args:
            transformer: the pipeline's base.
            fingerprint: its fingerprint.
            t5_tokens: number of T5's tokens that prompts get.
            dtype: dtype of the text encoders.
        """
        if fingerprint != self.fingerprint:
            return "made for another base model"
        if t5_tokens != self.t5_tokens:
            return f"made with t5_tokens={self.t5_tokens}, and this is {t5_tokens}"
        widths = (transformer.config.joint_attention_dim, transformer.config.pooled_projection_dim)
        for embeds, pooled in self.held.values():
            if {embeds.dtype, pooled.dtype} != {dtype}:
                return f"made in {embeds.dtype}, and this is {dtype}"
            if (embeds.shape[-1], pooled.shape[-1]) != widths:
                return "of another width than this base model reads"
        return ""

    def other_encoders(self, folder: Path | None) -> str:
        """Returns why they were made by other text encoders or tokenizers than a pipeline has; empty: nothing says so.

        Parts whose files are not there, as where they were never downloaded, are not compared.

        Args:
            folder: folder of the pipeline; None: none of its files is at hand.
        """
        theirs = {} if folder is None else encoder_fingerprints(folder)
        for name in theirs:
            if (theirs[name] is None) != (name not in self.text_encoders):
                return f"made {'without' if theirs[name] is not None else 'with'} a {name}"
            if theirs[name] not in (None, "", self.text_encoders.get(name)):
                return f"made with another {name}"
        return ""


class HeldPrompts:
    """Embeddings that are held by prompt, in front of text encoders that are read when another prompt comes.

    Args:
        held: embeddings and pooled ones by prompt, see `ShippedPrompts`.
        encoder: returns the text encoders.
    """

    def __init__(self, held: dict[str, Embeddings], encoder: Callable[[], PromptEncoder]):
        self.held, self.encoder = held, encoder

    def __call__(self, prompts: list[str], device: torch.device) -> Embeddings:
        """Returns prompt embeddings `(B, T, D_text)` and pooled ones `(B, D_pooled)`."""
        others = [prompt for prompt in prompts if prompt not in self.held]
        encoded: dict[str, tuple[Tensor, ...]] = {}
        if others:
            rows = (part.cpu().split(1) for part in self.encoder()(others, device))
            encoded = dict(zip(others, zip(*rows, strict=True), strict=True))
        return gather(self.held | encoded, prompts, device)


def encoder_fingerprints(folder: Path) -> dict[str, str | None]:
    """Returns the fingerprints of a pipeline's text encoders and tokenizers by name.

    None: the pipeline has no such part; empty: its files are not there, or cannot be read. Without the pipeline's index
    nothing is known, and the result is empty.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        present = {name: (index.get(name) or [None])[0] is not None for name in TEXT_PARTS}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    found = part_fingerprints(str(folder))
    return {name: found.get(name, "") if present[name] else None for name in TEXT_PARTS}
