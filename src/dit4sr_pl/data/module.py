"""Training and validation images, and the LR images made from them.

Workers decode, crop, flip and degrade, image by image, so a seed gives the same LR images for every device. Crop, flip,
empty prompt and degradation are functions of (seed, sample index, epoch), the order of samples is one of (seed, epoch),
and the place to resume at is one of the step number: see `common/randomness.py`.
"""

import functools
import itertools
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from dit4sr_pl.common.processes import START_METHOD, end_with_parent
from dit4sr_pl.common.randomness import permutation
from dit4sr_pl.data.datasets import (
    TOKEN,
    Draw,
    PairedImages,
    TrainingCrops,
    ValidationImages,
    ValidationPairs,
)
from dit4sr_pl.data.latents import CropSizes, LatentPairs
from dit4sr_pl.data.photo_sets import Folders


class Degrader(Protocol):
    """Interface of a degradation, as `SuperResolutionData` uses it."""

    def draw(self, seeds: Sequence[int], size: tuple[int, int]) -> Any:
        """Draws parameters for `len(seeds)` images of `size` (H, W), each a function of its own seed."""

    def __call__(self, images: torch.Tensor, params: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns LR `(B, 3, H/4, W/4)` and the target HR `(B, 3, H, W)` of images `(B, 3, H, W)` in 0..1."""


class PositionSampler(Sampler[list[Draw]]):
    """Endless batches of draws: position `p` of the run is sample `p % length` in the order of epoch `p // length`.

    Batch `s` of device `rank` holds `batch_size` positions from `start() + (s * world_size + rank) * batch_size`.

    Args:
        length: number of samples in an epoch.
        batch_size: samples per device and batch.
        seed: seed of the orders.
        start: function that returns the number of images seen so far, over all devices. It is called whenever an
            iteration begins, since Lightning begins anew after each of its epochs.
        rank: number of this device.
        world_size: number of devices.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        start: Callable[[], int] = lambda: 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.rank, self.world_size = start, rank, world_size

    def __iter__(self) -> Iterator[list[Draw]]:
        order = functools.lru_cache(maxsize=1)(lambda epoch: permutation(self.seed, epoch, self.length).tolist())
        for first in itertools.count(self.start() + self.rank * self.batch_size, self.world_size * self.batch_size):
            batch = []
            for position in range(first, first + self.batch_size):
                epoch, place = divmod(position, self.length)
                batch.append(Draw(order(epoch)[place], epoch, position))
            yield batch


InputMaker = Callable[[dict], dict[str, torch.Tensor]]  # from a batch to further entries of it


@dataclass(frozen=True)
class Degraded:
    """A function that makes a batch of samples, in a worker: images are degraded, except given pairs and latents.

    Args:
        degradation: makes LR and HR from images.
        step_inputs: returns what a training step needs besides; None: nothing.
    """

    degradation: Degrader
    step_inputs: InputMaker | None

    @torch.no_grad()
    def __call__(self, samples: list[dict]) -> dict:
        batch = default_collate(samples)
        if "clean" not in batch:
            batch |= self.images(batch)
        return batch if self.step_inputs is None else batch | self.step_inputs(batch)

    def images(self, batch: dict) -> dict[str, torch.Tensor]:
        """Returns `lr` and `hr`."""
        hr = batch["image"].float() / 255
        lr = batch["lr"].float() / 255 if "lr" in batch else hr.new_empty(0)
        if (params := drawn(self.degradation, batch)) is not None:
            chosen = degraded(batch)
            made, targets = self.degradation(hr[chosen], params)
            if len(chosen) == len(hr):
                lr, hr = made, targets
            else:
                lr[chosen], hr[chosen] = made, targets
        return {"lr": lr, "hr": hr}


def degraded(batch: dict) -> list[int]:
    """Returns the places in a batch of the images that are degraded: all but those of given pairs."""
    paired = batch["paired"].tolist() if "paired" in batch else [False] * len(batch["seed"])
    return [place for place, given in enumerate(paired) if not given]


def drawn(degradation: Degrader, batch: dict) -> Any:
    """Returns the parameters of the images that are degraded; None: there are none."""
    seeds = batch["seed"][degraded(batch)].tolist()
    return degradation.draw(seeds, tuple(batch["image"].shape[-2:])) if seeds else None


def leave_signals_to_the_trainer(worker: int) -> None:
    """Makes a worker ignore SIGTERM and the user signals, which schedulers send to every process of a job.

    A worker that dies of one would end the run before it is saved. It ends when the trainer does, however that ends.
    """
    end_with_parent(signal.SIGKILL)
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)


class SuperResolutionData(LightningDataModule):
    """Endless batches of LR and HR images for training, and the images for validation.

    A batch on the device has the keys of `TrainingCrops` and, in float32 and 0..1, `lr` `(B, 3, H/4, W/4)` and `hr`
    `(B, 3, H, W)`, with the parameters `degradation` that made them; `image` becomes float too. Workers add to training
    batches what the attribute `step_inputs` returns for them. Given pairs stay as they are: their `hr` is the photo,
    and `degradation` has the other images alone. `seed` and `position` are int64 `(B,)` and stay on the CPU, where
    generators are seeded.

    Training starts at image `global_step * batch_size * devices * accumulate_grad_batches`, so a checkpoint's step
    number is all that resuming needs. Under DDP the trainer needs `use_distributed_sampler=False`, otherwise Lightning
    refuses the loaders; endless training batches need `check_val_every_n_epoch=None` and an integer
    `val_check_interval`.

    Args:
        folders: folders of the training images, one or several; searched recursively.
        validation_folders: folders of the validation images; none turns validation off.
        degradation: makes LR and HR from images.
        crop_size: side of the training crops in pixels, a multiple of 16.
        validation_crop: side of the validation crops in pixels; None: whole images, one per batch.
        batch_size: images per device and batch.
        num_workers: worker processes per device.
        seed: seed of all draws.
        flip: see `TrainingCrops`.
        min_gradient: see `TrainingCrops`.
        redraws: see `TrainingCrops`.
        empty_prompt_probability: see `TrainingCrops`.
        photos_in_memory: see `TrainingCrops`.
        validation_limit: number of validation images; None: all.
        sets: further training images by name, the arguments of `PhotoSet`; a set whose folder is None is left out.
        pairs: training images with given LR images by name, the arguments of `PairSet`; without `hr` they are left out.
        latents: folders of latents that were encoded before the run, in the place of all photos (`LatentPairs`); None:
            images are degraded and encoded in every step. A batch then has `clean` and `lr_latent`, and no images.
        captions: captions of the latents, see `LatentPairs`.
        latents_in_memory: see `LatentPairs`.
        latent_crops: sides of the crops that are cut out of the latents, in pixels, each with its share of the
            batches, see `CropSizes`. None: all are of `crop_size`.
        validation: a benchmark (`conf/dataset/`) whose pairs are the validation images, in the place of folders.

    Raises:
        ValueError: a crop size is no multiple of 16, or there are both validation folders and a benchmark.
    """

    def __init__(
        self,
        folders: Folders,
        validation_folders: Folders,
        degradation: Degrader,
        crop_size: int = 512,
        validation_crop: int | None = 512,
        batch_size: int = 8,
        num_workers: int = 4,
        seed: int = 0,
        flip: bool = True,
        min_gradient: float = 0.2,
        redraws: int = 50,
        empty_prompt_probability: float = 0.2,
        photos_in_memory: int = 0,
        validation_limit: int | None = None,
        sets: Mapping[str, Mapping[str, Any]] | None = None,
        pairs: Mapping[str, Mapping[str, Any]] | None = None,
        latents: Folders | None = None,
        captions: str | None = None,
        latents_in_memory: bool = False,
        latent_crops: Sequence[tuple[int, float]] | None = None,
        validation: PairedImages | None = None,
    ):
        super().__init__()
        for name, size in (("crop_size", crop_size), ("validation_crop", validation_crop or TOKEN)):
            if size < 1 or size % TOKEN:
                raise ValueError(f"{name}={size}: must be a positive multiple of {TOKEN} pixels (one token)")
        if latents is not None:
            self.training = LatentPairs(latents, captions, crop_size, seed, empty_prompt_probability, latents_in_memory)
        else:
            self.training = TrainingCrops(
                *(folders, crop_size, seed, flip, min_gradient, redraws, empty_prompt_probability, photos_in_memory),
                *(sets, pairs),
            )
        self.validation = None
        if validation_folders and validation is not None:
            raise ValueError("data.validation and data.validation_folders are both given; give one of them")
        if validation_folders:
            self.validation = ValidationImages(validation_folders, validation_crop, seed, validation_limit)
        elif validation is not None:
            self.validation = ValidationPairs(validation, seed, validation_limit)
        self.degradation, self.seed = degradation, seed
        self.sources: dict[str, str] = {}  # what identifies the training images and captions, once they are checked
        self.step_inputs: InputMaker | None = None  # adds to a training batch, in the workers; a module may set it
        self.batch_size, self.num_workers = batch_size, num_workers
        self.latent_crops = latent_crops

    def validation_captions(self) -> list[str]:
        """Returns the captions of the validation images."""
        return [] if self.validation is None else self.validation.captions()

    @property
    def validation_name(self) -> str:
        """The name of the validation's scores: `validation`, or `validation_sharpened` where the HR images are the
        degradation's sharpened ones, or `validation_NAME` for the pairs of a benchmark."""
        if isinstance(self.validation, ValidationPairs):
            return f"validation_{self.validation.name}"
        # Other degradations than the package's need not have the attribute.
        sharpened = getattr(self.degradation, "sharpen", None) is not None
        return "validation_sharpened" if sharpened else "validation"

    def prepare_data(self) -> None:
        """Checks photos and captions, see `PhotoSet.check`, and decodes the validation images.

        Lightning calls it in one process per machine.
        """
        self.sources = self.training.check()
        if self.validation is not None and (self.trainer is None or self.trainer.limit_val_batches != 0):
            self.validation.check()

    def train_dataloader(self) -> DataLoader:
        """Returns the endless training batches of this device."""
        rank, world_size = self._place()
        sampler = PositionSampler(
            len(self.training), self.batch_size, self.seed, self._images_seen, rank=rank, world_size=world_size
        )
        if self.latent_crops is not None:
            sampler = CropSizes(sampler, self.latent_crops, self.training.shape, self.seed)
        return self._loader(self.training, sampler, self.step_inputs)

    def val_dataloader(self) -> DataLoader | list:
        """Returns every validation image once, over all devices; `[]` without validation folders."""
        if self.validation is None:
            return []
        rank, world_size = self._place()
        if len(self.validation) < world_size:
            raise ValueError(f"{len(self.validation)} validation images for {world_size} devices; give one to each")
        share = list(range(rank, len(self.validation), world_size))
        size = self.batch_size if self.validation.one_size else 1
        return self._loader(self.validation, [share[i : i + size] for i in range(0, len(share), size)])

    def transfer_batch_to_device(self, batch: dict, device: torch.device, dataloader_idx: int) -> dict:
        """Moves a batch to the device except its seeds, positions and `paired`, which are read on the CPU."""
        kept = ("seed", "position", "paired")  # reading them back would wait for the device
        on_cpu = {key: batch[key] for key in kept if key in batch}
        return super().transfer_batch_to_device(batch, device, dataloader_idx) | on_cpu

    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        """Makes `image` float and adds the parameters that the images were degraded with, if any were."""
        if "clean" in batch:
            return batch
        batch = batch | {"image": batch["image"].float() / 255}
        return batch if (params := drawn(self.degradation, batch)) is None else batch | {"degradation": params}

    def _loader(self, dataset: Dataset, batch_sampler: Any, step_inputs: InputMaker | None = None) -> DataLoader:
        return DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=self.num_workers,
            multiprocessing_context=START_METHOD if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=leave_signals_to_the_trainer,
            collate_fn=Degraded(self.degradation, step_inputs),
        )

    def _place(self) -> tuple[int, int]:
        """Returns rank and number of devices; without a trainer (in a notebook) the first of one."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _images_seen(self) -> int:
        if self.trainer is None or self.trainer.overfit_batches:  # then the first batches come again and again
            return 0
        per_batch = self.batch_size * self.trainer.world_size
        return self.trainer.global_step * per_batch * self.trainer.accumulate_grad_batches
