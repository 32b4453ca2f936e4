"""FLOPs and seconds of restoring one image: counted on tensors that have no memory, timed with random weights."""

import time
from dataclasses import dataclass, replace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dit4sr_pl.backbone.text_encoder import PromptEncoder
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.model import DiT4SRTransformer
from dit4sr_pl.planning.meta_backbone import MetaBackbone
from dit4sr_pl.planning.step_cost import CostCounter, give_storage
from dit4sr_pl.restoration.guided_velocity import GuidedVelocity
from dit4sr_pl.restoration.sampler import Sampler
from dit4sr_pl.restoration.sampling import restore
from dit4sr_pl.restoration.tiling import tiled


@dataclass(frozen=True)
class RestoringCost:
    """The cost of restoring one image.

    Args:
        parameters: number of the network's parameters, frozen and trained.
        evaluations: number of the solver's network evaluations; with guidance each runs two sequences per tile.
        sampling_flops: FLOPs of all of them.
        autoencoder_flops: FLOPs of encoding the LR image and decoding the result.
    """

    parameters: int
    evaluations: int
    sampling_flops: int
    autoencoder_flops: int

    @property
    def flops(self) -> int:
        """All FLOPs; the text encoders', once per prompt, are not among them."""
        return self.autoencoder_flops + self.sampling_flops


def restoring_cost(backbone: MetaBackbone, network: nn.Module, sampler: Sampler, size: int) -> RestoringCost:
    """Returns the cost of restoring an image to `size` x `size` pixels.

    Args:
        backbone: the frozen pipeline on the meta device, in half precision.
        network: the network on the meta device; afterwards its weights are fake tensors.
        sampler: how to restore.
        size: side of the result in pixels.
    """
    parameters = sum(parameter.numel() for parameter in network.parameters())
    solver, run = sampler.schedule(FlowMatchEulerDiscreteScheduler())
    evaluations = sampler.evaluations(solver, run, torch.device("cpu"))
    coder, prompts = backbone.coder(), random_prompts(backbone, network, sampler)
    make_ready(network)
    with FakeTensorMode(), torch.no_grad(), CostCounter() as counter:
        give_storage(network)
        give_storage(coder.vae)
        latent = coder.encode_tiled(torch.empty(1, 3, size, size), sampler.vae_tile)
        encoded = counter.work.flops
        velocity, batcher = (
            GuidedVelocity.of_captions(network, prompts, sampler, [""], latent.device),
            sampler.tile_batcher(network),
        )
        evaluations = [replace(each, timestep=torch.empty(())) for each in evaluations]
        alike = len({(each.guided, each.fresh, each.shift) for each in evaluations}) == 1
        for evaluation in evaluations[:1] if alike else evaluations:
            predict = lambda *tiles, evaluation=evaluation: velocity(*tiles, evaluation)  # noqa: E731
            tiles = sampler.tile, sampler.overlap, network.patch_size, batcher, evaluation.shift
            tiled(predict, latent, latent, *tiles)
        evaluated = counter.work.flops
        list(coder.decode_tiled(latent, sampler.vae_tile))
        decoded = counter.work.flops - evaluated
    sampling = (evaluated - encoded) * (len(run) if alike else 1)
    return RestoringCost(parameters, len(run), sampling, encoded + decoded)


def restoring_seconds(
    backbone: MetaBackbone, network: nn.Module, sampler: Sampler, size: int, device: torch.device
) -> float:
    """Returns the seconds of restoring one image on a device with random weights, after one step to warm up.

    Text encoders and files are not part of it.

    Args:
        backbone: the frozen pipeline on the meta device.
        network: the network on the meta device; afterwards it is on `device`.
        sampler: how to restore.
        size: side of the result in pixels.
        device: where the network runs.
    """
    make_ready(network)
    coder = backbone.coder()
    for part in (network, coder.vae):
        part.to_empty(device=device)
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.data.normal_(std=0.02, generator=torch.Generator(device).manual_seed(0))
    prompts, scheduler = random_prompts(backbone, network, sampler), FlowMatchEulerDiscreteScheduler()
    lr, sizes = torch.rand(1, 3, size // 4, size // 4, generator=generator("cpu", "plan")), (size, size)
    for steps in (1, sampler.steps):
        start = time.perf_counter()
        chosen, draws = sampler.changed(steps=steps), [generator("cpu", "plan")]
        restore(
            network, coder, prompts, scheduler, chosen, lr, sizes, [""], draws, device=device
        )  # waits for its result
        seconds = time.perf_counter() - start
    return seconds


def make_ready(network: nn.Module) -> None:
    """Brings a network into the state in which it restores: merged, and in the base's type."""
    if isinstance(network, DiT4SRTransformer):
        network.merge()
    nn.Module.to(network.eval().trained, network.base.dtype)


def random_prompts(backbone: MetaBackbone, network: nn.Module, sampler: Sampler) -> PromptEncoder:
    """Returns an encoder that gives random embeddings of the right shape instead of reading text encoders."""
    config, dtype, tokens = network.base.config, network.base.dtype, backbone.text_tokens(sampler.t5_tokens)

    def encode(prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        shapes = (len(prompts), tokens, config.joint_attention_dim), (len(prompts), config.pooled_projection_dim)
        embeds, pooled = (torch.randn(shape, dtype=dtype, device=device) for shape in shapes)
        return embeds, pooled

    return encode
