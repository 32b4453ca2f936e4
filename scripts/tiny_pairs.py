"""Encodes training pairs for the LR stream beforehand: latents of the HR tiles and of their enlarged LR images.

    python scripts/tiny_pairs.py --photos outputs/tiny/photos/train --pipeline outputs/tiny/base/tiny-sd3 \\
        --output outputs/tiny/pairs --degradations light:0.6 medium:0.4

Each tile, or each square of `--side` pixels of it, and its mirror image are degraded `--variants` times, each time with
one of the degradations. Worker processes degrade, the device encodes. The layout is that of `prepare stage=latents`, in
half precision and with 1024 pairs per file, which `data.latents_in_memory=true` reads. Files that exist are kept, so
the same command resumes.
"""

import argparse
import itertools
import math
import os
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from photos import Photos
from tiny_base import best_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from dit4sr_pl.backbone.autoencoder import LatentCoder
from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.files import atomic_write
from dit4sr_pl.common.randomness import derive_seed, generator
from dit4sr_pl.data.latents import HR, LR, latent_file
from dit4sr_pl.images.resize import enlarge

PIECE = 1024  # pairs per file
BATCH = 16  # pairs that are encoded at once; PIECE is a multiple of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of tiles (tiny_photos.py)")
    parser.add_argument("--pipeline", type=Path, required=True, help="tiny-sd3, of which the autoencoder is used")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pairs")
    parser.add_argument("--degradations", nargs="+", default=["light:0.6", "medium:0.4"], help="NAME:SHARE ...")
    parser.add_argument(
        "--side", type=int, default=256, choices=(64, 128, 256), help="pixels; tiles are cut into such squares"
    )
    parser.add_argument("--variants", type=int, default=1, help="pairs per tile and per mirror image")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    device = torch.device(best_device() if args.device == "auto" else args.device)
    backbone = Backbone(str(args.pipeline), "float32", t5_tokens=8)
    backbone.to(device)
    pairs = Pairs(args.photos, args.side, args.degradations, args.variants, args.seed)
    pieces = [range(first, min(first + PIECE, len(pairs))) for first in range(0, len(pairs), PIECE)]
    missing = [piece for piece in pieces if not all(path.exists() for path in files_of(args.output, piece).values())]
    # One loader for all files, since each start of the workers takes seconds.
    order = [index for piece in missing for index in piece]
    loader = iter(DataLoader(Subset(pairs, order), batch_size=BATCH, num_workers=args.workers))
    for piece in missing:
        batches = itertools.islice(loader, math.ceil(len(piece) / BATCH))
        latents = [encode(backbone.coder, device, *batch) for batch in batches]
        for path, latent in zip(files_of(args.output, piece).values(), zip(*latents, strict=True), strict=True):
            with atomic_write(path) as partial:
                torch.save(torch.cat(latent), partial)
        print(f"{piece.stop} of {len(pairs)} pairs", flush=True)
    print(f"{len(pairs)} pairs of {len(pairs.tiles)} tiles in {args.output}")


def files_of(folder: Path, piece: range) -> dict[str, Path]:
    """Returns the two files of some pairs."""
    return {kind: latent_file(folder, f"{piece.start // PIECE:04d}", kind) for kind in (HR, LR)}


class Pairs(Dataset):
    """LR and HR images of every tile and its mirror image, each as often as `variants` says, as functions of the seed.

    Args:
        photos: folder of the tiles.
        side: side of the images in pixels, which tiles are cut into.
        degradations: `NAME:SHARE`, by name in `conf/degradation/`; the shares are relative.
        variants: pairs per image.
        seed: of the choice of a degradation and of its draws.
    """

    def __init__(self, photos: Path, side: int, degradations: list[str], variants: int, seed: int):
        tiles = torch.from_numpy(Photos(photos).tiles).permute(0, 3, 1, 2)
        self.tiles = tiles.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        self.variants, self.seed = variants, seed
        shares = {name: float(share) for name, share in (text.rsplit(":", 1) for text in degradations)}
        self.shares = torch.tensor(list(shares.values()))
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            self.degradations = [instantiate(compose(f"degradation/{name}").degradation) for name in shares]

    def __len__(self) -> int:
        return 2 * self.variants * len(self.tiles)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns an LR image `(3, side / 4, side / 4)` and its HR image `(3, side, side)`, float32 in 0..1."""
        draws = generator("cpu", self.seed, "degradation of", index)
        degradation = self.degradations[int(torch.multinomial(self.shares, 1, generator=draws))]
        image = self.tiles[index % len(self.tiles)][None] / 255
        if index // len(self.tiles) % 2:
            image = image.flip(-1)
        lr, hr = degradation(image, degradation.draw([derive_seed(self.seed, "pair", index)], image.shape[-2:]))
        return lr[0], hr[0]


@torch.no_grad()
def encode(coder: LatentCoder, device: torch.device, lr: Tensor, hr: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the latents of the HR images and of the enlarged LR images, float16 `(B, 16, h, w)`, on the CPU."""
    lr, hr = lr.to(device), hr.to(device)
    clean, lr_latent = coder.encode(hr), coder.encode(enlarge(lr, hr.shape[-2:]))
    return clean.half().cpu(), lr_latent.half().cpu()


if __name__ == "__main__":
    main()
