"""A trained network that is ready to restore: backbone, network and sampler together."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from dit4sr_pl.backbone.fingerprints import check_parts
from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.model import DiT4SRTransformer, SD3ControlNet, Student, Variant, load_part
from dit4sr_pl.model.checkpoint_files import checkpoint_file
from dit4sr_pl.model.compilation import capture_graphs, compile_blocks
from dit4sr_pl.model.lora import LoRA
from dit4sr_pl.model.trained_part import fit_part, with_injection_scale
from dit4sr_pl.restoration.fitting import Size
from dit4sr_pl.restoration.sampler import Sampler
from dit4sr_pl.restoration.sampling import restore
from dit4sr_pl.restoration.tiling import spans


class Restorer:
    """Restores batches of LR images.

    Args:
        net: the whole network.
        backbone: its frozen pipeline.
        sampler: steps, guidance, tiles, colour.
    """

    def __init__(self, net: nn.Module, backbone: Backbone, sampler: Sampler):
        self.net, self.backbone, self.sampler = net, backbone, sampler
        sampler.check_network(net)
        self.batcher = sampler.tile_batcher(net)

    @classmethod
    def load(
        cls,
        backbone: Backbone,
        sampler: Sampler,
        checkpoint: str | Path,
        device: torch.device,
        offload: bool | None = None,
        injection_scale: float | None = None,
        compile: bool = False,
        cuda_graph: bool = False,
    ) -> "Restorer":
        """Loads a network from the file of its trained part, or from its name.

        Args:
            backbone: the frozen pipeline that the network was trained over.
            sampler: how to restore.
            checkpoint: see `checkpoint_file`.
            device: where the network works.
            offload: whether autoencoder and text encoders stay in the CPU's memory, each layer on the device while it
                runs.
            injection_scale: factor of LR Injection; None: the checkpoint's own.
            compile: whether the network's blocks are compiled.
            cuda_graph: whether the network's evaluations replay a CUDA graph per shape.

        Raises:
            FileNotFoundError: there is no such file, or it cannot be had of the hub.
            ValueError: the file is truncated, was trained over another base, or has no LR Injection to scale; or graphs
                are to be captured on a CPU.
        """
        path = checkpoint_file(checkpoint)
        part = load_part(path)
        net = build_network(backbone.transformer, with_injection_scale(part.network_config, injection_scale, path))
        fit_part(net, part, path)
        check_parts(backbone.name, backbone.parts, part.base.get("parts", {}), path)
        backbone.take_shipped_prompts(Path(path))
        backbone.to(device, offload)
        net.to(device)
        if isinstance(net, DiT4SRTransformer):
            net.merge()  # before its float32 is rounded
        net.to(backbone.dtype).eval()
        backbone.quantize(net.base)
        if compile:
            compile_blocks(net)
        if cuda_graph:
            capture_graphs(net)
        return cls(net, backbone, sampler)

    @property
    def evaluations(self) -> int:
        """Number of network evaluations per call."""
        return len(self.sampler.schedule(self.backbone.scheduler)[1])

    def tile_evaluations(self, lr: Size, size: Size) -> int:
        """Returns how often the network runs on a tile to restore one image; with guidance, twice per tile and step.

        Args:
            lr: height and width of the LR image.
            size: height and width of the result.
        """
        sampler, factor, patch = self.sampler, self.backbone.coder.factor, self.net.patch_size
        _, (height, width) = sampler.fitted(lr, size, factor, patch)
        latents = height // factor, width // factor
        count = 0
        for each in sampler.evaluations(*sampler.schedule(self.backbone.scheduler), torch.device("cpu")):
            rows, columns = spans(latents, sampler.tile, sampler.overlap, patch, each.shift)
            count += (2 if each.guided else 1) * len(rows) * len(columns)
        return count

    def __call__(
        self,
        lr: Tensor,
        size: tuple[int, int],
        captions: list[str],
        names: list[str],
        seed: int,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Restores LR images `(B, 3, h, w)` to `(B, 3, *size)`, both in 0..1 and on one device.

        Args:
            lr: LR images; their device need not be the network's.
            size: height and width of the result.
            captions: one per image, may be empty.
            names: one per image; an image's noise depends on its name and the seed.
            seed: seed of the noise.
            on_step: called after every network evaluation, `evaluations` times.
        """
        generators = [generator("cpu", "restore", seed, name) for name in names]
        parts = self.backbone.coder, self.backbone.prompts, self.backbone.scheduler
        where = self.backbone.device, self.batcher
        return restore(self.net, *parts, self.sampler, lr, size, captions, generators, on_step, *where)


def build_network(base: SD3Transformer2DModel, network_config: dict) -> nn.Module:
    """Returns the network that a network config describes, over `base`."""
    if network_config["network"] == "sd3_controlnet":
        return SD3ControlNet(base, network_config["num_layers"])
    student, lora = Student.of(network_config), LoRA.of(network_config)
    return DiT4SRTransformer(base, Variant(**network_config["variant"]), student=student, lora=lora)
