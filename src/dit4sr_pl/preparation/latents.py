"""Latents of fixed crops and of LR images made from them, so that training needs neither degradation nor autoencoder.

    latents.json                            what they were encoded with
    latent_hr/NAME.pt, latent_lr/NAME.pt    scaled latents (1, C, h, w), float32, as `torch.save` writes them

This is the layout of the authors' data scripts. `data/latents.py` reads it.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit4sr_pl.backbone.autoencoder import LatentCoder
from dit4sr_pl.common.files import atomic_write, has_contents
from dit4sr_pl.common.randomness import derive_seed, generator
from dit4sr_pl.data.latents import HR, LR, RECORD, latent_file, read_record
from dit4sr_pl.data.photo_sets import Photo
from dit4sr_pl.images.files import read_image
from dit4sr_pl.images.resize import enlarge


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Records in a new folder of latents what they are encoded with, or compares it with the record.

    Raises:
        ValueError: the folder has latents that were encoded with something else.
    """
    before = read_record(folder)
    if changed := [name for name in settings if before.get(name, settings[name]) != settings[name]]:
        texts = [f"{name}={before[name]} (now {settings[name]})" for name in changed[:3]]
        raise ValueError(f"latents={folder}: encoded with {', '.join(texts)}; give another folder")
    if not before and not (folder / HR).exists():
        with atomic_write(folder / RECORD) as partial:
            partial.write_text(json.dumps(dict(settings), indent=1), encoding="utf-8")


def write_latents(
    photos: Sequence[Photo],
    folder: Path,
    coder: LatentCoder,
    degradation: Any,
    size: int,
    seed: int,
    device: torch.device,
    track: Callable[[Sequence[Photo]], Iterable[Photo]] = iter,
) -> list[str]:
    """Writes the missing latents of crops and returns a message for each crop that cannot be encoded.

    The HR latent is a sample of the autoencoder's posterior, the LR latent its mode, as in a training step. Degradation
    and sample are functions of the seed and the crop's name.

    Args:
        photos: crops.
        folder: folder to write to.
        coder: the autoencoder.
        degradation: makes the LR image and the target of a crop; see `Degrader`.
        size: side that all crops must have, pixels.
        seed: seed of all draws.
        device: where images are degraded and encoded.
        track: wraps the crops that are iterated, such as a progress bar.
    """
    failed = []
    for photo in track(photos):
        files = {kind: latent_file(folder, photo.name, kind) for kind in (HR, LR)}
        missing = {kind: path for kind, path in files.items() if not has_contents(path)}
        if not missing:
            continue
        try:
            image = read_image(photo.path)
            if image.shape[1:] != (size, size):
                raise ValueError(
                    f"{photo.path}: {image.shape[2]}x{image.shape[1]} pixels; crops must be {size}x{size}, as "
                    "stage=crops cuts them"
                )
        except ValueError as error:
            failed.append(str(error))
            continue
        latents = encode_pair(image[None].to(device), photo.name, coder, degradation, seed)
        for kind, path in missing.items():
            with atomic_write(path) as partial:
                torch.save(latents[kind].cpu(), partial)
    return failed


@torch.no_grad()
def encode_pair(images: Tensor, name: str, coder: LatentCoder, degradation: Any, seed: int) -> dict[str, Tensor]:
    """Returns the latents `(1, C, h, w)` of a crop, uint8 `(1, 3, H, W)`, and of its enlarged LR image."""
    params = degradation.draw([derive_seed(seed, "degradation", name)], tuple(images.shape[-2:]))
    lr, hr = degradation(images.float() / 255, params)
    clean = coder.encode(hr, coder.posterior_noise(hr, [generator("cpu", "posterior", seed, name)]))
    return {HR: clean, LR: coder.encode(enlarge(lr, hr.shape[-2:]))}
