"""Counts what a GPU has to do at SD3.5-medium's size, without a GPU: launches, FLOPs, bytes and waits of the host.

    python benchmarks/launches.py [--toy] [--only evaluation training waits]

`evaluation` is one call of the merged network in bfloat16 with 64x64 latents, two sequences (one image under guidance)
and 333 text tokens. `training` is a step of 8 crops of 512x512 under bf16-mixed with 154 text tokens, with gradient
checkpointing and without. Both run the real code on tensors that have shapes and no memory. `launches` is the number of
operations that start a kernel, `elementwise GB` the gigabytes that all operations but products, convolutions and
attention read and write. `waits` is how often the host waits for the GPU, by the lines that ask, in a training step
with cached prompt embeddings and in a step of each solver; it does not depend on the size of the network.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode

from dit4sr_pl.common.files import ASSETS
from dit4sr_pl.data.module import SuperResolutionData
from dit4sr_pl.images.files import write_image
from dit4sr_pl.model import DiT4SRTransformer
from dit4sr_pl.planning.meta_backbone import MetaBackbone
from dit4sr_pl.planning.step_cost import CostCounter, Work, fused_norms, give_storage, step_cost

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from testing.host_waits import waits_of_sampling, waits_of_training  # noqa: E402

GIB = 2**30
SECTIONS = ("evaluation", "training", "waits")


def main() -> None:
    """Prints the sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="count tiny-sd3 with small images, in seconds")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=SECTIONS)
    args = parser.parse_args()
    name = "tiny-sd3" if args.toy else "published/stabilityai/stable-diffusion-3.5-medium"
    backbone = MetaBackbone(ASSETS / name, "bfloat16")
    if "evaluation" in args.only:
        show("evaluation, 2 sequences", evaluation(backbone, side=16 if args.toy else 64, t5_tokens=256))
    if "waits" in args.only:
        waits()
    if "training" in args.only:
        training(backbone, batch=2 if args.toy else 8, image=128 if args.toy else 512)


def show(name: str, work: Work, more: str = "") -> None:
    """Prints a line."""
    counts = f"{work.launches:8d} launches{work.flops / 1e12:9.2f} TFLOP{work.moved / 1e9:9.1f} elementwise GB"
    print(f"{name:34s}{counts}{more}")


def waits() -> None:
    """Prints how often the host waits for the GPU in a training step and in a step of each solver, and where."""
    with TemporaryDirectory() as folder:
        write_image(Path(folder) / "0.png", torch.rand(3, 64, 64))
        degradation = instantiate(OmegaConf.load(ROOT / "conf/degradation/light.yaml"))
        sizes = {"crop_size": 64, "batch_size": 2, "num_workers": 0, "min_gradient": 0.0}
        lines = waits_of_training(SuperResolutionData(folder, [], degradation, **sizes), steps=2)[-1]
    print(f"{'waits per training step':34s}{sum(lines.values()):8.1f} {dict(lines)}")
    for path in sorted((ROOT / "conf/sampler/solver").glob("*.yaml")):
        lines = waits_of_sampling(instantiate(OmegaConf.load(path)))
        print(f"{f'waits per step of {path.stem}':34s}{sum(lines.values()) / 4:8.1f} {dict(lines)}")


def evaluation(backbone: MetaBackbone, side: int, t5_tokens: int) -> Work:
    """Returns the work of one call of the merged network for two sequences."""
    network = backbone.network(DiT4SRTransformer)
    network.lr_stream.merge(network.base)
    network.to(backbone.dtype)
    with FakeTensorMode(), torch.no_grad(), CostCounter() as counter, fused_norms():
        give_storage(network, {})
        config, dtype = network.base.config, backbone.dtype
        latents = [torch.empty(2, config.in_channels, side, side, dtype=dtype) for _ in range(2)]
        embeds = torch.empty(2, backbone.text_tokens(t5_tokens), config.joint_attention_dim, dtype=dtype)
        pooled = torch.empty(2, config.pooled_projection_dim, dtype=dtype)
        before = counter.work
        network(*latents, torch.empty(2), embeds, pooled)
        return counter.work - before


def training(backbone: MetaBackbone, batch: int, image: int) -> None:
    """Prints the parts of a training step, checkpointed and not."""
    optimizer = partial(torch.optim.AdamW, lr=5e-5, fused=True)
    sizes = {"batch": batch, "image": image, "text_tokens": backbone.text_tokens(77), "precision": "bf16-mixed"}
    for checkpointing in (True, False):
        network = backbone.network(partial(DiT4SRTransformer, gradient_checkpointing=checkpointing))
        cost = step_cost(network, backbone.coder(), optimizer, **sizes)
        print(f"training step of {batch} x {image}x{image}, {'' if checkpointing else 'not '}checkpointed")
        for part in ("encode", "forward", "backward", "update"):
            show(f"  {part}", getattr(cost, part))
        show("  together", cost.work, f"{cost.activations / GIB:9.1f} GiB of activations")


if __name__ == "__main__":
    main()
