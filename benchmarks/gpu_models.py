"""Networks at SD3.5-medium's size with random weights, made where they run, and ways to run them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from gpu_measuring import Bench
from torch import Tensor, nn

import dit4sr_pl.model.lr_stream as lr_stream
from dit4sr_pl.degradation import Degradation
from dit4sr_pl.model import DiT4SRTransformer

try:
    from dit4sr_pl.backbone.autoencoder import LatentCoder, draw_noise
    from dit4sr_pl.backbone.flow import TimestepDensity
    from dit4sr_pl.backbone.sd3 import Backbone
    from dit4sr_pl.common.randomness import generator
    from dit4sr_pl.data.module import SuperResolutionData
    from dit4sr_pl.model.compilation import CUDAGraphs, capture_graphs, compile_blocks
    from dit4sr_pl.restoration.sampler import Sampler
    from dit4sr_pl.restoration.sampling import restore
    from dit4sr_pl.training.learning_rate import LearningRateSchedule
    from dit4sr_pl.training.module import SuperResolutionModule

    SINCE = {"timesteps": TimestepDensity(), "schedule": LearningRateSchedule("constant", 0, 1, 1.0, None, 0.0)}
except ModuleNotFoundError:  # the state at 6d90829, which section `before` runs, has other names
    from dit4sr_pl.latents import LatentCoder, draw_noise
    from dit4sr_pl.module import SuperResolutionModule
    from dit4sr_pl.randomness import generator
    from dit4sr_pl.sampling import Sampler, restore

    from dit4sr_pl.backbone import Backbone
    from dit4sr_pl.data import SuperResolutionData

    SINCE = {}
    CUDAGraphs = capture_graphs = compile_blocks = None

__all__ = [
    "CUDAGraphs",
    "LatentCoder",
    "SuperResolutionData",
    "SuperResolutionModule",
    "capture_graphs",
    "compile_blocks",
]
__all__ += ["draw_noise", "generator", "restore"]

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "src/dit4sr_pl/assets/published/stabilityai/stable-diffusion-3.5-medium"
TINY = ROOT / "src/dit4sr_pl/assets/tiny-sd3"
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class RandomPrompts:
    """Random embeddings from the CPU, in the place of text encoders or of embeddings on disk."""

    def __init__(self, tokens: int, width: int, pooled: int, dtype: torch.dtype):
        draw = generator("cpu", "embeddings")
        self.embeds = torch.randn(1, tokens, width, generator=draw).to(dtype)
        self.pooled = torch.randn(1, pooled, generator=draw).to(dtype)

    def __call__(self, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the embeddings, once per prompt."""
        return tuple(each.expand(len(prompts), *each.shape[1:]).to(device) for each in (self.embeds, self.pooled))

    of_step = __call__


class RandomBackbone(Backbone):
    """A backbone whose components come from config files alone, with random weights.

    Args:
        bench: says which device and which size.
        t5_tokens: number of T5's tokens in the text stream.
    """

    def __init__(self, bench: Bench, t5_tokens: int):
        self.toy, self.folder = bench.toy, TINY if bench.toy else PUBLISHED
        super().__init__(str(self.folder), "bfloat16" if bench.cuda else "float32", 8 if bench.toy else t5_tokens)
        self.device = bench.device

    def read(self, kind: type, **arguments: Any) -> Any:
        """Returns a component with random weights."""
        if kind is FlowMatchEulerDiscreteScheduler:
            return kind(shift=3.0)
        config = json.loads((self.folder / arguments["subfolder"] / "config.json").read_text())
        if self.toy and "num_layers" in config:
            config |= {"num_layers": 2, "dual_attention_layers": [0]}
        torch.manual_seed(0)
        with torch.device(self.device):
            model = getattr(diffusers, config["_class_name"]).from_config(config)
        return nn.Module.to(model, self.dtype).eval()

    @property
    def prompts(self) -> RandomPrompts:
        """Random embeddings."""
        config = self.transformer.config
        clip = json.loads((self.folder / "text_encoder/config.json").read_text())["max_position_embeddings"]
        widths = config.joint_attention_dim, config.pooled_projection_dim
        return RandomPrompts(clip + self.t5_tokens, *widths, self.dtype)


def make_network(base: SD3Transformer2DModel, **options: Any) -> DiT4SRTransformer:
    """Returns a network whose weights are not zero: products of zeros run faster."""
    with torch.device(base.device):
        network = DiT4SRTransformer(base, **options)
    torch.manual_seed(1)
    for parameter in network.lr_stream.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return network


def merge(network: DiT4SRTransformer) -> None:
    """Merges a network for restoring."""
    stream = network.lr_stream
    (stream.merge if hasattr(stream, "merge") else stream.fold)(network.base)  # `fold` at 6d90829
    nn.Module.to(network.eval(), network.base.dtype)


def inputs(bench: Bench, backbone: RandomBackbone, count: int) -> Inputs:
    """Returns the inputs of an evaluation for `count` sequences."""
    config, side, dtype = backbone.transformer.config, 16 if bench.toy else 64, backbone.dtype
    torch.manual_seed(2)
    latents = [torch.randn(count, config.in_channels, side, side, device=bench.device, dtype=dtype) for _ in range(2)]
    embeds = [each.to(dtype) for each in backbone.prompts([""] * count, bench.device)]
    return *latents, torch.rand(count, device=bench.device) * 1000, *embeds


def conf(path: str) -> dict[str, Any]:
    """Returns the keys of a file below `conf/` without what Hydra reads."""
    keys = yaml.safe_load((ROOT / "conf" / path).read_text())
    return {key: value for key, value in keys.items() if key not in ("defaults", "_target_", "_partial_")}


def sampler(bench: Bench, **options: Any) -> Sampler:
    """Returns the paper's sampler with some options changed."""
    toy = {"steps": 2, "tile": 16, "overlap": 4, "smallest": 16, "vae_tile": 16, "tile_memory": 0.05}
    fields = conf("sampler/paper.yaml") | (toy if bench.toy else {}) | options
    known = {name: value for name, value in fields.items() if name in Sampler.__dataclass_fields__}
    return Sampler(**{"solver": FlowMatchEulerDiscreteScheduler.from_config} | known)


def degradation() -> Degradation:
    """Returns the paper's degradation."""
    return Degradation(**conf("degradation/seesr.yaml"))


def module(bench: Bench, compile: bool = False, **options: Any) -> SuperResolutionModule:
    """Returns the module of a training with random weights; options are the network's."""
    return SuperResolutionModule(
        backbone=RandomBackbone(bench, 77),
        network=lambda base: make_network(base, **options),
        checkpoint=None,
        weighting="released",
        optimizer=partial(torch.optim.AdamW, lr=5e-5, fused=True),
        sampler=sampler(bench),
        compile=compile,
        seed=0,
        **SINCE,
    )


@contextmanager
def two_matrices() -> Iterator[None]:
    """Runs LR projections as the released code does: every LR token passes the frozen matrix, then the trained one."""

    def project(self, name: str, frozen: nn.Module, lr: Tensor, *norm: nn.Module | None) -> Tensor:
        return lr_stream.heads(frozen, getattr(self, name)(getattr(frozen, f"to_{name}")(lr)), *norm)

    ours, lr_stream.LRAttention.project = lr_stream.LRAttention.project, project
    try:
        yield
    finally:
        lr_stream.LRAttention.project = ours
