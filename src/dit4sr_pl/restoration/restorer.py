"""A trained network ready to restore: backbone, network and sampler together."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.common.files import ASSETS
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.model import DiT4SRTransformer, SD3ControlNet, Variant, load_part
from dit4sr_pl.model.trained_part import fit_part
from dit4sr_pl.restoration.sampling import Sampler, restore


class Restorer:
    """Restores batches of LR images.

    Args:
        net: the whole network. backbone: its frozen pipeline. sampler: steps, guidance, tiles, colour.
    """

    def __init__(self, net: nn.Module, backbone: Backbone, sampler: Sampler):
        self.net, self.backbone, self.sampler = net, backbone, sampler
        self.batcher = sampler.tile_batcher(net)

    @classmethod
    def load(
        cls,
        backbone: Backbone,
        sampler: Sampler,
        checkpoint: str | Path,
        device: torch.device,
        offload: bool = False,
    ) -> "Restorer":
        """From an LR-stream or ControlNet file, a training checkpoint (`.ckpt`) or the name of a shipped LR stream.

        With `offload` the autoencoder and the text encoders stay in the CPU's memory; each of their layers is on the
        device while it runs.

        Raises:
            FileNotFoundError, ValueError: missing, truncated, or not trained over this backbone.
        """
        path = checkpoint_file(checkpoint)
        part = load_part(path)
        net = build_network(backbone.transformer, part.network_config)
        fit_part(net, part, path)
        backbone.to(device, offload)
        net.to(device)
        if isinstance(net, DiT4SRTransformer):
            net.lr_stream.merge(net.base)  # before its float32 is rounded
        return cls(net.to(backbone.dtype).eval(), backbone, sampler)

    @property
    def evaluations(self) -> int:
        """Network evaluations of one call."""
        return len(self.sampler.schedule(self.backbone.scheduler)[1])

    def __call__(
        self,
        lr: Tensor,
        size: tuple[int, int],
        captions: list[str],
        names: list[str],
        seed: int,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """`(B, 3, h, w)` to `(B, 3, *size)`, both in 0..1 and on one device, which need not be the network's; an
        image's noise depends on the seed and its name.

        `on_step` is called `evaluations` times, after every evaluation of the network.
        """
        generators = [generator("cpu", "restore", seed, name) for name in names]
        parts = self.backbone.coder, self.backbone.prompts, self.backbone.scheduler
        where = self.backbone.device, self.batcher
        return restore(self.net, *parts, self.sampler, lr, size, captions, generators, on_step, *where)


def checkpoint_file(checkpoint: str | Path) -> Path:
    """The file of a trained part, by path or by the name of a shipped one."""
    shipped = ASSETS / str(checkpoint) / "lr_stream.safetensors"
    return shipped if shipped.is_file() else Path(checkpoint)


def build_network(base: SD3Transformer2DModel, network_config: dict) -> nn.Module:
    """The network that a trained part's network config describes, over `base`."""
    if network_config["network"] == "sd3_controlnet":
        return SD3ControlNet(base, network_config["num_layers"])
    return DiT4SRTransformer(base, Variant(**network_config["variant"]))
