"""This project's own networks: DiT4SR, its variants, and the SD3-ControlNet baseline."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import cached_property

import torch
from torch import Tensor

from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.common.hashing import weights_hash
from dit4sr_pl.common.run_identity import without_added
from dit4sr_pl.evaluation.benchmark_sets import SCALE
from dit4sr_pl.evaluation.methods import LRImage, same_size
from dit4sr_pl.model import load_part
from dit4sr_pl.model.checkpoint_files import checkpoint_file
from dit4sr_pl.model.trained_part import method_and_variant, with_injection_scale
from dit4sr_pl.restoration.restorer import Restorer
from dit4sr_pl.restoration.sampler import Sampler


class DiT4SR:
    """A trained part over its frozen backbone; both are read when the first image comes.

    Args:
        label: name of the row; None: the paper's name of the network in the checkpoint.
        checkpoint: see `Restorer.load`.
        backbone: the frozen pipeline.
        sampler: how to restore.
        seed: seed of the noise.
        device: device of the network.
        injection_scale: factor of LR Injection; None: the checkpoint's own.
        compile: whether the network's blocks are compiled.
        cuda_graph: whether the network's evaluations replay a CUDA graph per shape.
        batch_size: number of images of one size that are restored at once. It belongs to no identity: an image's noise
            depends on its name and the seed alone.
    """

    def __init__(
        self,
        label: str | None,
        checkpoint: str,
        backbone: Backbone,
        sampler: Sampler,
        seed: int,
        device: str,
        injection_scale: float | None = None,
        compile: bool = False,
        cuda_graph: bool = False,
        batch_size: int = 1,
    ):
        self.given, self.backbone, self.sampler, self.seed, self.device = checkpoint, backbone, sampler, seed, device
        self.injection_scale, self.compile, self.cuda_graph = injection_scale, compile, cuda_graph
        self.batch_size = batch_size
        part = load_part(checkpoint_file(checkpoint))
        self.network_config = with_injection_scale(part.network_config, injection_scale, checkpoint)
        row, self.variant = method_and_variant(part.network_config)
        self.label = label or row
        self.weights_hash = weights_hash(part.state)
        base = {"name": backbone.name, "dtype": str(backbone.dtype), "t5_tokens": backbone.t5_tokens}
        if backbone.quantization is not None:
            base["quantization"] = backbone.quantization
        base["parts"] = backbone.parts
        solver, _ = sampler.schedule(backbone.scheduler)
        sampled = without_added(asdict(sampler), "sampler.")
        sampled["solver"] = [type(solver).__name__, dict(solver.config)]
        del sampled["tile_memory"]  # it changes no result and may be lowered when memory is short
        self.identity = {"weights_hash": self.weights_hash, "network": part.network_config, "base": base}
        self.identity |= {"sampler": sampled, "seed": seed}
        if self.network_config != part.network_config:
            self.identity["injection_scale"] = injection_scale

    @cached_property
    def restorer(self) -> Restorer:
        """The network, loaded at its first use."""
        device = torch.device(self.device)
        options = None, self.injection_scale, self.compile, self.cuda_graph
        return Restorer.load(self.backbone, self.sampler, self.given, device, *options)

    def __call__(self, lr_images: Iterable[LRImage]) -> Iterator[tuple[str, Tensor]]:
        for names, lr, captions in same_size(lr_images, self.batch_size):
            size = tuple(SCALE * length for length in lr.shape[-2:])
            yield from zip(names, self.restorer(lr, size, captions, names, self.seed), strict=True)
