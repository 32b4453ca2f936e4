"""Crops that the tiny-sd3 scripts share: some to train on, others to measure on."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images


class Photos:
    """All tiles of a folder in memory, as uint8 `(N, 256, 256, 3)`; `names` are their files' names, without suffixes.

    `batch` draws flipped and turned crops from them.
    """

    def __init__(self, folder: Path):
        files = [file for file in sorted(folder.glob("*")) if not file.name.startswith(".")]
        if not files:
            raise SystemExit(f"{folder}: no tiles; run scripts/tiny_photos.py first")
        self.names = [file.stem for file in files]
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's lock
            self.tiles = np.stack(list(pool.map(lambda file: np.asarray(Image.open(file)), files)))

    def __len__(self) -> int:
        return len(self.tiles)

    def batch(self, size: int, crop: int, seed: tuple[int, int]) -> torch.Tensor:
        """`size` crops `(B, 3, crop, crop)` in -1..1, a function of `seed` alone."""
        rng = np.random.default_rng(seed)
        crops = np.empty((size, crop, crop, 3), dtype=np.uint8)
        for i in range(size):
            tile = self.tiles[rng.integers(len(self.tiles))]
            top, left = rng.integers(0, 256 - crop + 1, size=2)
            patch = np.rot90(tile[top : top + crop, left : left + crop], rng.choice(4, p=(0.7, 0.1, 0.1, 0.1)))
            crops[i] = patch[:, ::-1] if rng.random() < 0.5 else patch
        return torch.from_numpy(crops).permute(0, 3, 1, 2) / 127.5 - 1


def held_out_crops(crop: int) -> torch.Tensor:
    """Central crops `(B, 3, crop, crop)` in -1..1 of the photos that scikit-image and scikit-learn ship."""
    images = [getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins")]
    images += [getattr(data, name)() for name in ("brick", "grass", "gravel", "hubble_deep_field", "retina")]
    images += [data.stereo_motorcycle()[0], *load_sample_images().images]
    crops = []
    for image in images:
        image = image if image.ndim == 3 else np.stack([image] * 3, axis=-1)
        top, left = (image.shape[0] - crop) // 2, (image.shape[1] - crop) // 2
        crops.append(torch.from_numpy(image[top : top + crop, left : left + crop, :3].copy()).permute(2, 0, 1))
    return torch.stack(crops) / 127.5 - 1


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over images of the PSNR of images in -1..1, in dB."""
    mse = (a.clamp(-1, 1) - b).square().mean(dim=(1, 2, 3)) / 4
    return float((-10 * mse.log10()).mean())
