"""Results as `evaluate` leaves them, made up."""

from pathlib import Path

import numpy as np
from PIL import Image

from dit4sr_pl.scores.results import Result, write_result

Scores = dict[str, dict[str, float]]


def draw_scores(seed: int, images: int = 6, metrics: tuple[str, ...] = ("psnr", "ssim")) -> Scores:
    values = np.random.default_rng(seed).normal(10, 1, (images, len(metrics)))
    return {f"{image:02}": dict(zip(metrics, row.tolist(), strict=True)) for image, row in enumerate(values)}


def made_up(scores: Scores, method: str = "DiT4SR", variant: str = "", dataset: str = "realsr", seed: int = 0, **other):
    fields = dict(run="made up", pictures="", identity_hash="", weights_hash="", versions={}) | other
    return Result(method=method, variant=variant, dataset=dataset, seed=seed, scores=scores, **fields)


def write_run(folder: Path, result: Result, size: tuple[int, int] = (40, 40)) -> None:
    """With pictures where the result has such: grey, and brighter by the seed of the sampler."""
    write_result(result, folder)
    if result.pictures:
        for name in result.scores:
            path = folder / result.pictures / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, (result.seed * 10,) * 3).save(path)
