"""Made-up results in the form that `evaluate` writes."""

from pathlib import Path

import numpy as np
from PIL import Image

from dit4sr_pl.scores.results import Result, write_result

Scores = dict[str, dict[str, float]]


def draw_scores(seed: int, images: int = 6, metrics: tuple[str, ...] = ("psnr", "ssim")) -> Scores:
    """Returns scores of images, drawn with a seed."""
    values = np.random.default_rng(seed).normal(10, 1, (images, len(metrics)))
    return {f"{image:02}": dict(zip(metrics, row.tolist(), strict=True)) for image, row in enumerate(values)}


def made_up(scores: Scores, method: str = "DiT4SR", variant: str = "", dataset: str = "realsr", seed: int = 0, **other):
    """Returns a result with given scores; other fields have defaults."""
    fields = dict(run="made up", pictures="", identity_hash="", weights_hash="", versions={}) | other
    return Result(method=method, variant=variant, dataset=dataset, seed=seed, scores=scores, **fields)


def write_run(folder: Path, result: Result, size: tuple[int, int] = (40, 40)) -> None:
    """Writes a result and, if it names a folder of pictures, grey pictures whose brightness depends on the seed."""
    write_result(result, folder)
    if result.pictures:
        for name in result.scores:
            path = folder / result.pictures / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, (result.seed * 10,) * 3).save(path)
