"""The modules of a frozen SD3 pipeline on the meta device: real shapes, no weights, made from config files alone."""

import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import SD3Transformer2DModel
from torch import nn

from dit4sr_pl.backbone.autoencoder import LatentCoder

CLIP_ENCODERS = ("text_encoder", "text_encoder_2")
TEXT_ENCODERS = (*CLIP_ENCODERS, "text_encoder_3")


class MetaBackbone:
    """The modules that `Backbone` would read, at their real size and without memory for weights.

    Args:
        folder: holds `transformer/config.json`, `vae/config.json` and, if text encoders run, their config files.
        dtype: type of the frozen weights: `float32`, `bfloat16` or `float16`.
    """

    def __init__(self, folder: Path, dtype: str):
        self.folder = folder
        self.dtype = getattr(torch, dtype)

    # `nn.Module.to` is called below because diffusers' `to` warns about weights to keep in float32. SD3 has none.

    def config(self, part: str) -> dict:
        """Returns the config of one subfolder of the pipeline."""
        return json.loads((self.folder / part / "config.json").read_text())

    def base(self) -> SD3Transformer2DModel:
        """Returns the transformer."""
        with torch.device("meta"):
            return nn.Module.to(SD3Transformer2DModel.from_config(self.config("transformer")), self.dtype)

    def network(
        self, make: Callable[[SD3Transformer2DModel], nn.Module], base: SD3Transformer2DModel | None = None
    ) -> nn.Module:
        """Returns the network that `make` builds over a transformer, with its trained part in float32. None: a
        new one."""
        with torch.device("meta"):
            network = make(self.base() if base is None else base)
        network.trained.float()
        return network

    def coder(self) -> LatentCoder:
        """Returns the autoencoder with its latents' scale and shift."""
        config = self.config("vae")
        with torch.device("meta"):
            return LatentCoder(nn.Module.to(getattr(diffusers, config["_class_name"]).from_config(config), self.dtype))

    def text_encoders(self) -> list[nn.Module]:
        """Returns both CLIP encoders and T5."""
        encoders = []
        for part in TEXT_ENCODERS:
            config = self.config(part)
            kind = getattr(transformers, config["architectures"][0])
            with torch.device("meta"):
                encoders.append(kind(kind.config_class.from_dict(config)).to(self.dtype))
        return encoders

    def text_tokens(self, t5_tokens: int) -> int:
        """Returns the length of the text stream: CLIP's tokens, which both CLIP encoders share, and T5's after them."""
        return self.config(CLIP_ENCODERS[0])["max_position_embeddings"] + t5_tokens
