"""Measures what a GPU makes of DiT4SR at SD3.5-medium's size, with random weights, in 8 minutes.

    python benchmarks/gpu.py [--out outputs/gpu] [--minutes 8] [--only forward training ...]
    python benchmarks/gpu.py --toy --device cpu      # everything at toy size, to test the benchmark

It needs PyTorch, lightning, transformers, accelerate, diffusers and kornia, and no weights, photos or Hydra. Sections
run in the order below, each only if its share of the time is left; `results.json` is written again after each, and the
table comes last. Times are medians by CUDA events; `of the first` is the ratio to the first time of the group. Variants
are next to their distance from the plain one: norm of the difference over norm. W^L is not zero, since products of
zeros run faster.

If `.base/src` holds the sources of an earlier state, section `before` measures `forward` and `training` with them:

    mkdir .base && git archive 6d90829 src/dit4sr_pl ':!*.safetensors' | tar -x -C .base

Compiled code is kept in the folder of the results and used by the next run there.
"""

import argparse
from pathlib import Path

import torch
from gpu_measuring import Bench, table
from gpu_network import BASE, before, forward, lightning, restoring, training
from gpu_parts import autoencoder, degrading, environment, kernels, text

SECTIONS = {  # with the seconds that must be left to begin
    environment: 15,
    forward: 110,
    training: 110,
    before: 100,
    restoring: 60,
    lightning: 45,
    degrading: 20,
    autoencoder: 30,
    text: 25,
    kernels: 40,
}
LARGEST = 15 * 2**20  # bytes of compiled code that are kept


def main() -> None:
    """Runs the sections and prints the table."""
    names = [section.__name__ for section in SECTIONS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true", help="toy size")
    parser.add_argument("--before", action="store_true", help=argparse.SUPPRESS)  # as section `before` calls this
    args = parser.parse_args()
    bench = Bench(args.device, args.toy, args.out, 60 * args.minutes)
    cache = args.out / "compiled.bin"
    if cache.is_file():
        torch.compiler.load_cache_artifacts(cache.read_bytes())
    for section, seconds in SECTIONS.items():
        if section.__name__ in args.only and (section is not before or BASE.is_dir()):
            bench.run(section.__name__, seconds, section)
    artifacts = torch.compiler.save_cache_artifacts()
    if artifacts is not None and len(artifacts[0]) <= LARGEST:
        cache.write_bytes(artifacts[0])
    print(*table(bench.sections), sep="\n")


if __name__ == "__main__":
    main()
