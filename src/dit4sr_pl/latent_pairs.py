"""Training on pairs of latents that `scripts/tiny_pairs.py` made before the run.

A step then needs neither the degradation nor the autoencoder. Crops are cut out of the latents, so one set of pairs
serves crops of several sizes. Validation restores images, as without pairs.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, IterableDataset

from dit4sr_pl.data import TOKEN, SuperResolutionData
from dit4sr_pl.randomness import generator

LATENT = 8  # pixels per latent along one side


class LatentPairs(IterableDataset):
    """Endless batches of latent crops, each a function of the seed and of its position in the run:

    - `clean`, `lr_latent`: float16 `(B, C, h, w)`, of the HR image and of the enlarged LR image
    - `position`: of each crop in the run, int64 `(B,)`
    - `prompt`: empty

    Args:
        folder: holds `*.safetensors` with `clean` and `lr_latent` `(N, C, H, W)`, written by `scripts/tiny_pairs.py`.
        crops: share of the batches by crop size in pixels.
        batch_size: crops of the smallest size in a batch; batches of larger crops have fewer, with as many tokens.
        seed: of the crops.
        start: returns the images seen before the run's next step, over all devices.
        rank, world_size: of this device.

    Raises:
        FileNotFoundError: there are no pairs in the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        crops: Mapping[int, float],
        batch_size: int,
        seed: int,
        start: Callable[[], int] = lambda: 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{folder}: no latent pairs; run scripts/tiny_pairs.py --output {folder}")
        pieces = [load_file(file) for file in files]
        self.latents = [torch.cat([piece[name] for piece in pieces]) for name in ("clean", "lr_latent")]
        self.sizes = [int(size) // LATENT for size in crops]
        self.shares = torch.tensor([float(share) for share in crops.values()])
        self.batch_size, self.seed, self.start = batch_size, seed, start
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[dict]:
        for first in itertools.count(self.start() + self.rank * self.batch_size, self.world_size * self.batch_size):
            yield self.batch(first)

    def batch(self, first: int) -> dict:
        """Returns the batch whose first crop has this position in the run."""
        draws = generator("cpu", self.seed, "latent pairs", first)
        size = self.sizes[int(torch.multinomial(self.shares, 1, generator=draws))]
        count = max(1, self.batch_size * min(self.sizes) ** 2 // size**2)
        number, _, height, width = self.latents[0].shape
        pair, top, left = (
            torch.randint(places, (count, 1, 1), generator=draws)
            for places in (number, height - size + 1, width - size + 1)
        )
        rows, columns = top + torch.arange(size)[:, None], left + torch.arange(size)
        clean, lr_latent = (latents[pair, :, rows, columns].permute(0, 3, 1, 2) for latents in self.latents)
        position = torch.arange(first, first + count)
        return {"clean": clean, "lr_latent": lr_latent, "position": position, "prompt": [""] * count}


class LatentPairsData(SuperResolutionData):
    """Batches of latent pairs for training, and images for validation.

    Args:
        pairs: folder of the pairs.
        crops: share of the batches by crop size in pixels, each a multiple of 16.
        arguments: as for `SuperResolutionData`; its `folders` are the photos that the pairs were made of.

    Raises:
        ValueError: a crop size is not a multiple of 16.
    """

    def __init__(self, pairs: str, crops: Mapping[int, float], **arguments):
        super().__init__(**arguments)
        if any(int(size) % TOKEN for size in crops):
            raise ValueError(f"data.crops={dict(crops)}: sizes must be multiples of {TOKEN} pixels (one token)")
        self.pairs, self.crops = pairs, crops

    def train_dataloader(self) -> DataLoader:
        rank, world_size = self._place()
        pairs = LatentPairs(
            self.pairs, self.crops, self.batch_size, self.seed, self._images_seen, rank=rank, world_size=world_size
        )
        return DataLoader(pairs, batch_size=None, pin_memory=torch.cuda.is_available())

    def transfer_batch_to_device(self, batch: dict, device: torch.device, dataloader_idx: int) -> dict:
        if "clean" not in batch:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        on_device = {key: batch[key].to(device, non_blocking=True) for key in ("clean", "lr_latent")}
        return batch | on_device

    @torch.no_grad()
    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        return batch if "clean" in batch else super().on_after_batch_transfer(batch, dataloader_idx)
