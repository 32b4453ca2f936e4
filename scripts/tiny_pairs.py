"""Encodes training pairs for the LR stream beforehand: latents of the HR tiles and of their enlarged LR images.

    python scripts/tiny_pairs.py --photos outputs/tiny/photos/train --pipeline outputs/tiny/base/tiny-sd3 \\
        --output outputs/tiny/pairs --degradations light:0.6 medium:0.4

Each tile and its mirror image are degraded `--variants` times, each time with one of the degradations. Worker
processes degrade, the device encodes. Pieces that are there already are kept, so the same command continues a run that
was stopped. `experiment=tiny_dit4sr` trains on the result.
"""

import argparse
import os
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from photos import Photos
from safetensors.torch import save_file
from tiny_base import best_device, fast
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dit4sr_pl.backbone import Backbone
from dit4sr_pl.config import conf_folder
from dit4sr_pl.latents import enlarge
from dit4sr_pl.randomness import derive_seed, generator

PIECE, BATCH = 1024, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of tiles (tiny_photos.py)")
    parser.add_argument("--pipeline", type=Path, required=True, help="tiny-sd3, of which the autoencoder is used")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pairs")
    parser.add_argument("--degradations", nargs="+", default=["light:0.6", "medium:0.4"], help="NAME:SHARE ...")
    parser.add_argument("--variants", type=int, default=1, help="pairs per tile and per mirror image")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    device = torch.device(best_device() if args.device == "auto" else args.device)
    backbone = Backbone(str(args.pipeline), "float32", t5_tokens=8)
    backbone.to(device)
    pairs = Pairs(args.photos, args.degradations, args.variants, args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    for number, first in enumerate(range(0, len(pairs), PIECE)):
        file = args.output / f"pairs-{number:03d}.safetensors"
        if not file.exists():
            piece = torch.utils.data.Subset(pairs, range(first, min(first + PIECE, len(pairs))))
            loader = DataLoader(piece, BATCH, num_workers=args.workers)
            latents = [encode(backbone, device, *(images.to(device) for images in batch)) for batch in loader]
            clean, lr_latent = (torch.cat(part).cpu() for part in zip(*latents, strict=True))
            save_file({"clean": clean, "lr_latent": lr_latent}, file.with_suffix(".tmp"))
            os.replace(file.with_suffix(".tmp"), file)
        print(f"{min(first + PIECE, len(pairs))} of {len(pairs)} pairs", flush=True)


class Pairs(Dataset):
    """LR and HR images of every tile and its mirror image, each as often as `variants` says; a function of the seed.

    Args:
        photos: folder of the tiles.
        degradations: `NAME:SHARE`, by name in `conf/degradation/`; the shares are relative.
        variants: pairs per image.
        seed: of the choice of a degradation and of its draws.
    """

    def __init__(self, photos: Path, degradations: list[str], variants: int, seed: int):
        self.tiles = torch.from_numpy(Photos(photos).tiles).permute(0, 3, 1, 2)
        self.variants, self.seed = variants, seed
        named = [text.rsplit(":", 1) for text in degradations]
        self.shares = torch.tensor([float(share) for _, share in named])
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            self.degradations = [instantiate(compose(f"degradation/{name}").degradation) for name, _ in named]

    def __len__(self) -> int:
        return 2 * self.variants * len(self.tiles)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns an LR image `(3, 64, 64)` and its HR image `(3, 256, 256)`, float32 in 0..1."""
        draws = generator("cpu", self.seed, "degradation of", index)
        degradation = self.degradations[int(torch.multinomial(self.shares, 1, generator=draws))]
        image = self.tiles[index % len(self.tiles)][None] / 255
        if index // len(self.tiles) % 2:
            image = image.flip(-1)
        lr, hr = degradation(image, degradation.draw([derive_seed(self.seed, "pair", index)], image.shape[-2:]))
        return lr[0], hr[0]


def encode(backbone: Backbone, device: torch.device, lr: Tensor, hr: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the latents of the HR images and of the enlarged LR images, float16 `(B, 16, 32, 32)`."""
    with torch.autocast(device.type, torch.bfloat16, enabled=fast(device)):
        clean, lr_latent = backbone.coder.encode(hr), backbone.coder.encode(enlarge(lr, hr.shape[-2:]))
    return clean.half(), lr_latent.half()


if __name__ == "__main__":
    main()
