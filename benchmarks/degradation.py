"""Compares the degradation's images per second with those of the same degradation as a plain loop, in one process.

    python benchmarks/degradation.py [--batch 8] [--size 512] [--repeats 3] [--device cpu]

The loop (testing/slow_degradation.py) runs on the CPU. It takes one image at a time, builds each kernel value by value,
and every blur is a full 2-D convolution, including the 51x51 one of the sharpening. Resize, noise and JPEG are the same
code on both sides, so the ratio shows only what the kernels, the separable sharpening and the blurs by FFT are worth.
Both sides get the same images and the same drawn parameters, and the fastest of the repeats counts.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from testing import slow_degradation  # noqa: E402


def images_per_second(run: Callable[[], object], images: int, repeats: int) -> float:
    """Returns the images per second of the fastest of `repeats` runs, after one to warm up."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return images / min(seconds)


def main() -> None:
    """Prints the images per second of both and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    degradation = instantiate(OmegaConf.load(ROOT / "conf" / "degradation" / "seesr.yaml"))
    images = torch.rand(args.batch, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    params = degradation.draw(range(args.batch), (args.size, args.size))
    on_device = images.to(args.device)

    fast = images_per_second(lambda: degradation(on_device, params), args.batch, args.repeats)
    slow = images_per_second(lambda: slow_degradation.degrade(degradation, images, params), args.batch, args.repeats)
    print(f"batch {args.batch}, {args.size}x{args.size}, {args.device}, {torch.get_num_threads()} threads")
    print(f"degradation  {fast:7.2f} images/s")
    print(f"plain loop   {slow:7.2f} images/s (CPU)")
    print(f"ratio        {fast / slow:7.2f}")


if __name__ == "__main__":
    main()
