"""Fixed crops of photos, cut once before training, so that each has a caption of its own."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dit4sr_pl.common.randomness import generator
from dit4sr_pl.data.datasets import pad_to
from dit4sr_pl.data.photo_sets import PhotoSet
from dit4sr_pl.images.files import image_size, is_complete_png, read_image, write_image

# The rules of the authors' data script.
SMALLEST_PHOTO = 384 * 384  # pixels; smaller photos are left out
SMALLEST_FILE = 100 * 1024  # bytes; smaller files are left out
MIN_GRADIENT = 0.2  # a crop with a smaller or equal `channel_gradient` is drawn again
DRAWS = 50  # of a crop; the last one stands


class Source(NamedTuple):
    """A photo to cut, and the files of its crops."""

    photo: Path
    name: str
    crops: list[Path]


class Cut(NamedTuple):
    """The outcome of `write_crops`: the number of photos left out, by reason, and a message per unreadable file."""

    left_out: Counter
    failed: list[str]


def sources(sets: Iterable[PhotoSet], folder: Path, per_photo: int) -> list[Source]:
    """Returns the photos of all sets with their crops, `folder/SET/NAME_K.png` with K from 0.

    SET is the set's name, or the last part of a folder's path.

    Raises:
        ValueError: two photos would have the same crops.
    """
    found: dict[str, Source] = {}
    for photo_set in sets:
        for photo in photo_set.photos:
            name = f"{Path(photo_set.name).name}/{photo.name}"
            source = Source(photo.path, name, [folder / f"{name}_{k}.png" for k in range(per_photo)])
            if found.setdefault(name, source) is not source:
                raise ValueError(f"{found[name].photo} and {photo.path} would have the same crops; rename one of them")
    return list(found.values())


def write_crops(
    photos: Sequence[Source],
    size: int,
    seed: int,
    track: Callable[[Sequence[Source]], Iterable[Source]] = iter,
) -> Cut:
    """Cuts the missing crops of photos; each is a function of the seed, the photo's name and the crop's number.

    Args:
        photos: photos with the files of their crops.
        size: side of the crops, pixels; smaller photos are padded by reflection first.
        seed: seed of the places, and of which crops are mirrored: half of them, as in the authors' script.
        track: wraps the photos that are iterated, such as a progress bar.
    """
    cut = Cut(Counter(), [])
    for source in track(photos):
        try:
            if reason := left_out(source.photo):
                cut.left_out[reason] += 1
            elif missing := [k for k, path in enumerate(source.crops) if not is_complete_png(path)]:
                image = read_image(source.photo)
                for k in missing:
                    crop = draw_crop(image, size, generator("cpu", seed, "crop", source.name, k))
                    write_image(source.crops[k], crop / 255)
        except ValueError as error:
            cut.failed.append(str(error))
    return cut


def left_out(photo: Path) -> str | None:
    """Returns why a photo is too small to be cut; None: it is cut."""
    if photo.stat().st_size < SMALLEST_FILE:
        return "under 100 KB"
    width, height = image_size(photo)
    return "under 384x384 pixels" if width * height < SMALLEST_PHOTO else None


def is_pending(source: Source) -> bool:
    """Returns whether crops of a photo are still to be cut; an unreadable photo has none."""
    try:
        return not all(is_complete_png(path) for path in source.crops) and not left_out(source.photo)
    except ValueError:
        return False


def draw_crop(image: Tensor, size: int, draws: torch.Generator) -> Tensor:
    """Returns a crop `(3, size, size)` of an image `(3, H, W)`, both uint8; flat places are drawn again.

    Args:
        image: the photo.
        size: side of the crop, pixels.
        draws: generator of the places and of the mirroring.
    """
    image = pad_to(image, size, size)
    for _ in range(DRAWS):
        top, left = (int(torch.randint(length - size + 1, (), generator=draws)) for length in image.shape[1:])
        crop = image[:, top : top + size, left : left + size]
        if channel_gradient(crop) > MIN_GRADIENT:
            break
    return crop.flip(-1) if torch.rand((), generator=draws) < 0.5 else crop


def channel_gradient(image: Tensor) -> float:
    """Returns the mean 3x3 Sobel magnitude over all pixels and colours of a uint8 image `(3, H, W)`.

    Values are in 0..1 and the kernels are not normalised. Edges are reflected.
    """
    smooth, slope = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0])
    kernels = torch.stack([torch.outer(smooth, slope), torch.outer(slope, smooth)])[:, None]
    padded = F.pad(image[:, None] / 255, (1, 1, 1, 1), mode="reflect")
    return float(F.conv2d(padded, kernels).square().sum(dim=1).sqrt().mean())
