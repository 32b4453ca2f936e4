"""A pipeline's shapes without its weights: diffusers' modules on the meta device, made from their configs alone."""

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


class Skeleton:
    """What `Backbone` would read, at its real size and without a byte of weights.

    Args:
        folder: with `transformer/config.json`, `vae/config.json` and, where they run, the text encoders' configs.
        dtype: of the frozen weights: `float32`, `bfloat16` or `float16`.
    """

    def __init__(self, folder: Path, dtype: str):
        self.folder = folder
        self.dtype = getattr(torch, dtype)

    # `nn.Module.to`: diffusers' own warns of weights to keep in float32, of which these models have none.

    def config(self, part: str) -> dict:
        return json.loads((self.folder / part / "config.json").read_text())

    def network(self, make: Callable[[SD3Transformer2DModel], nn.Module]) -> nn.Module:
        """`make`'s network over the frozen transformer; what is trained is in float32."""
        with torch.device("meta"):
            network = make(nn.Module.to(SD3Transformer2DModel.from_config(self.config("transformer")), self.dtype))
        network.trained.float()
        return network

    def coder(self) -> LatentCoder:
        config = self.config("vae")
        with torch.device("meta"):
            return LatentCoder(nn.Module.to(getattr(diffusers, config["_class_name"]).from_config(config), self.dtype))

    def text_encoders(self) -> list[nn.Module]:
        encoders = []
        for part in TEXT_ENCODERS:
            config = self.config(part)
            kind = getattr(transformers, config["architectures"][0])
            with torch.device("meta"):
                encoders.append(kind(kind.config_class.from_dict(config)).to(self.dtype))
        return encoders

    def text_tokens(self, t5_tokens: int) -> int:
        """CLIP's and T5's tokens stand one after another; both CLIP encoders share theirs."""
        return self.config(CLIP_ENCODERS[0])["max_position_embeddings"] + t5_tokens
