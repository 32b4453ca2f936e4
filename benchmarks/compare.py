"""Seconds that `python -m dit4sr_pl.compare` takes, started as a process, for six runs of a hundred images.

    python benchmarks/compare.py [--images 100] [--repeats 3] [--folder FOLDER]

The five variants of Table 3 and a second seed of FULL, seven metrics, pictures of 512x512 (smooth, some 230 kB each),
of which the strip's crops are chosen; written into a temporary folder or into FOLDER, which is left there.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from dit4sr_pl.comparison.paper import VARIANTS
from dit4sr_pl.scores.results import Result, write_result

METRICS = {"psnr": 25, "ssim": 0.7, "stlpips": 0.3, "musiq": 60, "maniqa": 0.6, "clipiqa": 0.5, "liqe": 3.5}


def write_runs(folder: Path, images: int) -> None:
    """Writes six runs with made-up scores and pictures."""
    for number, (variant, seed) in enumerate([(name, 0) for name in VARIANTS] + [("full", 1)]):
        draws = np.random.default_rng(number)
        run = folder / variant / f"seed{seed}"
        names = [f"{image:03}" for image in range(images)]
        scores = {
            name: {metric: mean * draws.normal(1 - number / 100, 0.1) for metric, mean in METRICS.items()}
            for name in names
        }
        result = Result(f"{variant}/seed{seed}", "DiT4SR", variant, "realsr", seed, "images", "", "", {}, scores)
        (run / "images").mkdir(parents=True)
        for name in names:
            small = Image.fromarray(draws.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            small.resize((512, 512), Image.Resampling.BICUBIC).save(run / "images" / f"{name}.png")
        write_result(result, run)


def measure(folder: Path, images: int, repeats: int) -> None:
    """Prints the seconds of the command over several calls."""
    write_runs(folder / "runs", images)
    command = [sys.executable, "-m", "dit4sr_pl.compare", "runs", "output=comparison"]
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        print(f"compare, 6 runs of {images} images: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure((arguments.folder or Path(temporary)).resolve(), arguments.images, arguments.repeats)
