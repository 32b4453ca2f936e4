"""Compares images restored over a quantized base with those over the plain one, next to what a batch size changes.

    python benchmarks/quantization.py [--dtype bfloat16] [--images 4]

tiny-dit4sr restores random smooth images to 128x128 with its own sampler. A distance is the norm of the difference of
two results over the norm of the plain one, whose images are restored one at a time; `levels` is the root mean square
difference in 8-bit levels.
"""

import argparse
from dataclasses import replace

import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.model.quantized import KINDS, stored_bytes
from dit4sr_pl.restoration.restorer import Restorer
from dit4sr_pl.restoration.sampler import Sampler
from testing import ROOT


def main() -> None:
    """Prints a line per kind of quantization."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--images", type=int, default=4)
    args = parser.parse_args()
    lr = enlarge(torch.rand(args.images, 3, 8, 8, generator=generator("cpu", "images")), (32, 32))
    plain = restored(args.dtype, None, lr, 1)
    print(f"{args.dtype}, {args.images} images{'distance':>20s}{'levels':>10s}{'bytes of the base':>20s}")
    show(f"{args.images} at a time", plain, restored(args.dtype, None, lr, args.images), args.dtype, None)
    for kind in KINDS:
        show(kind, plain, restored(args.dtype, kind, lr, 1), args.dtype, kind)


def restored(dtype: str, kind: str | None, lr: Tensor, at_a_time: int) -> Tensor:
    """Returns the restored images."""
    files = [yaml.safe_load((ROOT / f"conf/sampler/{name}.yaml").read_text()) for name in ("paper", "tiny")]
    fields = {key: value for file in files for key, value in file.items() if key not in ("defaults", "_target_")}
    sampler = replace(Sampler(FlowMatchEulerDiscreteScheduler.from_config, **fields), color="none")
    backbone = Backbone("tiny-sd3", dtype, 8, quantization=kind)
    restorer = Restorer.load(backbone, sampler, "tiny-dit4sr", torch.device("cpu"))
    names, results = [str(image) for image in range(len(lr))], []
    for first in range(0, len(lr), at_a_time):
        batch, chosen = lr[first : first + at_a_time], names[first : first + at_a_time]
        results.append(restorer(batch, (128, 128), [""] * len(batch), chosen, seed=0))
    return torch.cat(results)


def show(name: str, plain: Tensor, ours: Tensor, dtype: str, kind: str | None) -> None:
    """Prints a line."""
    distance, levels = (ours - plain).norm() / plain.norm(), 255 * (ours - plain).square().mean().sqrt()
    size = stored_bytes(Backbone("tiny-sd3", dtype, 8).transformer, kind)
    print(f"{name:20s}{distance:20.1e}{levels:10.2f}{size:20,d}")


if __name__ == "__main__":
    main()
