"""A trained DiT4SR ready to restore: backbone, LR stream and sampler together."""

from pathlib import Path

import torch
from torch import Tensor

from dit4sr_pl.backbone import SHIPPED, Backbone
from dit4sr_pl.model import DiT4SRTransformer
from dit4sr_pl.model.checkpoints import fit_lr_stream, load_lr_stream
from dit4sr_pl.randomness import generator
from dit4sr_pl.sampling import Sampler, restore


class Restorer:
    """Restores batches of LR images.

    Args:
        net: the whole network. backbone: its frozen pipeline. sampler: steps, guidance, tiles, colour.
    """

    def __init__(self, net: DiT4SRTransformer, backbone: Backbone, sampler: Sampler, device: torch.device):
        self.net, self.backbone, self.sampler = net.to(device).eval(), backbone, sampler
        backbone.to(device)

    @classmethod
    def load(cls, backbone: Backbone, sampler: Sampler, checkpoint: str | Path, device: torch.device) -> "Restorer":
        """From an LR-stream file, a training checkpoint (`.ckpt`) or the name of a shipped LR stream.

        Raises:
            FileNotFoundError, ValueError: missing, truncated, or of another architecture than the backbone.
        """
        shipped = SHIPPED / str(checkpoint) / "lr_stream.safetensors"
        path = shipped if shipped.is_file() else Path(checkpoint)
        variant, state = load_lr_stream(path)
        net = DiT4SRTransformer(backbone.transformer, variant)
        fit_lr_stream(net.lr_stream, state, path)
        net.lr_stream.to(backbone.dtype)
        return cls(net, backbone, sampler, device)

    def __call__(self, lr: Tensor, size: tuple[int, int], captions: list[str], names: list[str], seed: int) -> Tensor:
        """`(B, 3, h, w)` to `(B, 3, *size)`, both in 0..1; an image's noise depends on the seed and its name."""
        generators = [generator("cpu", "restore", seed, name) for name in names]
        parts = self.backbone.coder, self.backbone.prompts, self.backbone.scheduler
        return restore(self.net, *parts, self.sampler, lr, size, captions, generators)
