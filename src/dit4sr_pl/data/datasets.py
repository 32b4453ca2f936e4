"""Training crops and validation images: decoded, cut and flipped in DataLoader workers."""

import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from kornia.color import rgb_to_grayscale
from kornia.filters import sobel
from torch.utils.data import Dataset

from dit4sr_pl.common.names import check_name, folded
from dit4sr_pl.common.randomness import derive_seed, generator
from dit4sr_pl.data.photo_sets import SCALE, Folders, Mixture, Photo, fingerprint, open_sets, side_by_side
from dit4sr_pl.images.files import UnreadableNow, check_image, image_size, read_image

log = logging.getLogger(__name__)

PAUSES = (0.1, 1, 10)  # seconds between attempts to read a photo
TOKEN = 16  # side of a token in pixels: the VAE reduces 8x, and 2x2 latents are one token


class Draw(NamedTuple):
    """One training sample: `index` within its `epoch`, with `position` samples before it in the run.

    With sets of weight 1, `index` counts photos; otherwise `Mixture` says which photo it is. `crop` is the side of the
    crop that is cut out of latents, in latents; None: that of the data.
    """

    index: int
    epoch: int
    position: int
    crop: int | None = None


def mean_gradient(image: torch.Tensor) -> float:
    """Returns the mean over pixels of the 3x3 Sobel magnitude of a uint8 image `(3, H, W)`.

    Grey is in 0..1 and the kernels are not normalised: a ramp that rises by `s` per pixel has the gradient `8 s`.
    """
    grey = rgb_to_grayscale(image / 255)
    return float(sobel(grey[None], normalized=False, eps=0).mean())


def pad_to(image: torch.Tensor, height: int, width: int, mode: str = "reflect") -> torch.Tensor:
    """Pads an image `(3, H, W)` to at least `(height, width)` by reflection at its bottom and right.

    With the mode `symmetric` the outermost pixels come twice, so that an LR image and its photo stay aligned.
    """
    down, right = max(0, height - image.shape[1]), max(0, width - image.shape[2])
    if not down and not right:
        return image
    # NumPy reflects as often as needed; PyTorch's padding stops at the image's own size.
    return torch.from_numpy(np.pad(image.numpy(), ((0, 0), (0, down), (0, right)), mode=mode))


def patiently(path: Path) -> torch.Tensor:
    """Returns a photo's pixels; a file that the system cannot read now is read again a few times.

    Raises:
        UnreadableNow: it still cannot be read.
        ValueError: the file is damaged or no image.
    """
    for pause in PAUSES:
        try:
            return read_image(path)
        except UnreadableNow:
            time.sleep(pause)
    return read_image(path)


class TrainingCrops(Dataset):
    """Random crops of the photos in folders and named sets (see `open_sets`). The sample of a `Draw` is a dict:

    - `image`: uint8 `(3, crop_size, crop_size)`; smaller photos are padded by reflection first
    - `seed`: seed of the degradation, in `[0, 2**63)`
    - `position`: position of the draw
    - `prompt`: the photo's caption, empty with `empty_prompt_probability`
    - `name`: path below the folder, without suffix
    - with `pairs`, `paired`: whether the LR image is given, and `lr`: uint8 `(3, crop_size/4, crop_size/4)`, the same
      place of it, or zeros

    An unreadable file is reported once, by name, whichever worker reads it, and the next readable photo takes its
    place.

    Args:
        folders: folders of photos, one or several.
        crop_size: side of the crops, pixels.
        seed: seed of all draws.
        flip: whether half of the crops are mirrored.
        min_gradient: smallest `mean_gradient` of a crop; flatter crops are drawn again.
        redraws: how often a flat crop is drawn again; the last one stands.
        empty_prompt_probability: probability of an empty prompt.
        photos_in_memory: number of photos that stay decoded in each worker, the first that it decodes.
        sets: further sets of photos by name, see `open_sets`.
        pairs: sets of photos with given LR images by name, see `open_sets`.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: a folder is empty, or no file is readable.
    """

    def __init__(
        self,
        folders: Folders,
        crop_size: int,
        seed: int,
        flip: bool = True,
        min_gradient: float = 0.2,
        redraws: int = 50,
        empty_prompt_probability: float = 0.2,
        photos_in_memory: int = 0,
        sets: Mapping[str, Mapping[str, Any]] | None = None,
        pairs: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        self.sets = open_sets(folders, sets, pairs)
        self.photos = [photo for photo_set in self.sets for photo in photo_set.photos]
        self.mixture = Mixture([len(s.photos) for s in self.sets], [s.weight for s in self.sets], seed)
        self.paired = any(photo.lr is not None for photo in self.photos)
        self.photos_in_memory, self.decoded = photos_in_memory, {}
        self.crop_size, self.seed, self.flip = crop_size, seed, flip
        self.min_gradient, self.redraws = min_gradient, redraws
        self.empty_prompt_probability = empty_prompt_probability
        # The flags lie in shared memory, so that a worker knows what another one has reported.
        self.reported = torch.zeros(len(self.photos), dtype=torch.bool).share_memory_()
        self._read(0)

    def __len__(self) -> int:
        """Returns the number of samples in an epoch."""
        return len(self.mixture)

    def prompts(self) -> set[str]:
        """Returns all prompts of samples, the empty one included."""
        return {"", *(photo.prompt for photo in self.photos)}

    def check(self) -> dict[str, str]:
        """Checks the photos and captions of all sets; result and errors are those of `PhotoSet.check`."""
        return {what: found for photo_set in self.sets for what, found in photo_set.check().items()}

    def listing(self) -> str:
        """Returns what must be the same on all devices: number and hash of the photos' names, in their order."""
        return fingerprint((photo.file,) for photo in self.photos)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        photo, image, lr = self._read(self.mixture.photo(draw.index, draw.epoch))
        draws = generator("cpu", self.seed, "sample", draw.index, draw.epoch)
        u_flip, u_prompt = torch.rand(2, generator=draws).tolist()
        images = self._crop(image, lr, draws)
        if self.flip and u_flip < 0.5:
            images = {key: each.flip(-1) for key, each in images.items()}
        return images | {
            "seed": derive_seed(self.seed, "degradation", draw.index, draw.epoch),
            "position": draw.position,
            "prompt": "" if u_prompt < self.empty_prompt_probability else photo.prompt,
            "name": photo.name,
            **({"paired": lr is not None} if self.paired else {}),
        }

    def _read(self, index: int) -> tuple[Photo, torch.Tensor, torch.Tensor | None]:
        """Returns photo number `index`, or the next readable one after it, with its and its LR image's pixels."""
        for candidate in itertools.chain(range(index, len(self.photos)), range(index)):
            photo = self.photos[candidate]
            if candidate in self.decoded:
                return photo, *self.decoded[candidate]
            try:
                images = patiently(photo.path), None if photo.lr is None else patiently(photo.lr)
                if len(self.decoded) < self.photos_in_memory:
                    self.decoded[candidate] = images
                return photo, *images
            except UnreadableNow:
                raise  # another photo in its place would be another training
            except ValueError as error:
                if not self.reported[candidate]:
                    self.reported[candidate] = True
                    log.warning("%s; skipped, the next image takes its place", error)
        raise ValueError(
            f"{self.photos[0].path.parent}: none of the {len(self.photos)} images is readable; give another folder"
        )

    def _crop(self, image: torch.Tensor, lr: torch.Tensor | None, draws: torch.Generator) -> dict[str, torch.Tensor]:
        """Returns a crop of a photo and, with pairs, the same place of its LR image, whose pixels it begins with."""
        size, small, step = self.crop_size, self.crop_size // SCALE, 1 if lr is None else SCALE
        image = pad_to(image, size, size, "reflect" if lr is None else "symmetric")
        places = [(length - size) // step + 1 for length in image.shape[1:]]
        for _ in range(1 + self.redraws):
            top, left = (int(torch.randint(n, (), generator=draws)) for n in places)
            crop = image[:, step * top : step * top + size, step * left : step * left + size]
            if not self.min_gradient or mean_gradient(crop) >= self.min_gradient:
                break
        if lr is not None:
            lr = pad_to(lr, small, small, "symmetric")[:, top : top + small, left : left + small]
        elif self.paired:
            lr = crop.new_zeros(3, small, small)
        return {"image": crop} if lr is None else {"image": crop, "lr": lr}


class ValidationImages(Dataset):
    """Fixed samples with the keys of `TrainingCrops`; a prompt is never empty by chance.

    `seed` depends on the dataset's seed and the image's name alone.

    Args:
        folders: folders of images, one or several.
        crop: side of central crops, pixels; None: whole images, cut to whole tokens. Smaller images are enlarged by
            reflection.
        seed: seed of the degradation.
        limit: number of images, counted from the first; None: all.

    Raises:
        ValueError: two images have one name, or a file is unreadable; scores over varying images could not be
            compared.
    """

    def __init__(self, folders: Folders, crop: int | None, seed: int, limit: int | None = None):
        self.sets = open_sets(folders)
        self.photos = [photo for photo_set in self.sets for photo in photo_set.photos][:limit]
        check_names(self.photos)
        self.crop, self.seed, self.one_size = crop, seed, crop is not None

    def __len__(self) -> int:
        return len(self.photos)

    def check(self) -> None:
        """Checks the images and captions of all folders; decodes the images, which every validation does.

        Raises:
            ValueError: an image is damaged, or see `PhotoSet.check`.
        """
        for photo_set in self.sets:
            photo_set.check()
        side_by_side(lambda photo: check_image(photo.path), self.photos)

    def captions(self) -> list[str]:
        """Returns the captions of all images."""
        return [photo.prompt for photo in self.photos]

    def __getitem__(self, index: int) -> dict[str, Any]:
        photo = self.photos[index]
        image = read_image(photo.path)
        height, width = (self.crop or max(TOKEN, length // TOKEN * TOKEN) for length in image.shape[1:])
        image = pad_to(image, height, width)
        top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
        return {
            "image": image[:, top : top + height, left : left + width],
            "seed": derive_seed(self.seed, "validation", photo.name),
            "position": index,
            "prompt": photo.prompt,
            "name": photo.name,
        }


def check_names(photos: Sequence[Photo]) -> None:
    """Raises ValueError if two validation images have one name, by which noise, scores and pictures are kept."""
    first = {}
    for photo in photos:
        check_name(photo.file, photo.folder)
        if (other := first.setdefault(folded(photo.name), photo)) is not photo:
            raise ValueError(
                f"{other.path} and {photo.path} are two validation images of one name; rename one of them, "
                "or validate on one of their folders"
            )


class PairedImages(Protocol):
    """Interface of a benchmark (`conf/dataset/`), as validation uses it."""

    name: str

    def items(self, restored: Path) -> Sequence[Any]:
        """Returns the images: `name`, `hr` (None: no ground truth), `caption`, `read_lr()`, `read_hr()`, in 0..1."""


class ValidationPairs(Dataset):
    """The pairs of a benchmark with the keys of `ValidationImages`, and `lr` and `paired` of `TrainingCrops`.

    Args:
        benchmark: the benchmark.
        seed: seed of the noise.
        limit: number of images, counted from the first; None: all.

    Raises:
        ValueError: the benchmark has no ground truth.
    """

    def __init__(self, benchmark: PairedImages, seed: int, limit: int | None = None):
        self.name, self.seed = benchmark.name, seed
        self.items = benchmark.items(Path())[:limit]
        if any(item.hr is None for item in self.items):
            raise ValueError(f"data.validation={self.name}: has no ground truth; take realsr, drealsr or div2k_val")
        self.one_size = len({item.crop or image_size(item.hr) for item in self.items}) == 1

    def __len__(self) -> int:
        return len(self.items)

    def captions(self) -> list[str]:
        """Returns the captions of all images."""
        return [item.caption for item in self.items]

    def check(self) -> None:
        """Decodes the images, which every validation does; raises ValueError if one is damaged."""
        side_by_side(lambda item: check_image(item.hr), self.items)
        side_by_side(lambda item: item.lr and check_image(item.lr), self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        lr, hr = (image[0].mul(255).round().byte() for image in (item.read_lr(), item.read_hr()))
        return {
            "image": hr,
            "lr": lr,
            "paired": True,
            "seed": derive_seed(self.seed, "validation", item.name),
            "position": index,
            "prompt": item.caption,
            "name": item.name,
        }
