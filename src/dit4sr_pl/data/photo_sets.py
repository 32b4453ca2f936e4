"""Named sets of photos: which photos, how often each comes, and where their captions are."""

import bisect
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dit4sr_pl.common.randomness import generator
from dit4sr_pl.data.manifest import MANIFEST, check_sizes, list_photos, read_manifest
from dit4sr_pl.images.captions import CaptionFiles, CaptionTable, open_captions

log = logging.getLogger(__name__)

Folders = str | Path | Sequence[str | Path]


class Photo(NamedTuple):
    """An HR training image: its folder, its path below that, and its set's captions."""

    folder: Path
    file: str  # path below the folder, with `/`
    captions: CaptionFiles | CaptionTable

    @property
    def path(self) -> Path:
        """The photo's file."""
        return self.folder / self.file

    @property
    def name(self) -> str:
        """Path below the folder, without suffix."""
        return self.file.rpartition(".")[0]

    @property
    def prompt(self) -> str:
        """The caption on one line, empty if there is none."""
        return self.captions[self.name]


class PhotoSet:
    """The photos of one folder, sorted by path, as the list `photos`.

    With a manifest the photos are those that it lists: no folder is walked and no file is accessed before `check`, and
    the files that it knows to be damaged are left out.

    Args:
        folder: folder of photos, at any depth.
        name: the set's name in messages; None: the folder.
        limit: number of photos to take, counted from the first and including damaged ones, so that a set is the same
            with and without a manifest; None: all.
        weight: how often each photo comes per epoch on average; see `Mixture`.
        captions: folder of `.txt` files or a table, see `captions`; None: `.txt` files next to the photos.
        manifest: path of the manifest; None: `manifest.parquet` in the folder, if it exists.

    Raises:
        FileNotFoundError: the folder, the captions or the manifest do not exist.
        ValueError: one of them cannot be read, or a number is out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str | None = None,
        limit: int | None = None,
        weight: float = 1.0,
        captions: str | Path | None = None,
        manifest: str | Path | None = None,
    ):
        self.folder, self.name, self.weight = Path(folder), name or str(folder), weight
        if limit is not None and limit < 1:
            raise ValueError(f"{self.name}: limit={limit}; give a positive number of photos, or null for all")
        if not 0 < weight < math.inf:
            raise ValueError(f"{self.name}: weight={weight}; give a positive number (no folder leaves a set out)")
        files, self.sizes, self.damaged = self._files(manifest, limit)
        self.captions = CaptionFiles(self.folder) if captions is None else open_captions(captions)
        self.photos = [Photo(self.folder, file, self.captions) for file in files]
        if round(weight * len(files)) == 0:
            raise ValueError(f"{self.name}: weight={weight} of {len(files)} photos: fewer than one per epoch")

    def _files(self, path: str | Path | None, limit: int | None) -> tuple[list[str], list[int] | None, list[str]]:
        if path is None and not (self.folder / MANIFEST).exists():
            return list_photos(self.folder)[:limit], None, []
        path = Path(path or self.folder / MANIFEST)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such folder; give the path of the photos that {path} lists")
        listed = read_manifest(path, limit)
        if not listed.files:
            raise ValueError(f"{path}: no readable photo in this manifest")
        return listed

    def check(self) -> None:
        """Compares every file's size with the manifest's, and logs damaged photos and the number of captions.

        Without a manifest no photo is accessed.

        Raises:
            ValueError: a file is missing or has another size.
        """
        if self.sizes is not None:
            check_sizes(self.folder, [photo.file for photo in self.photos], self.sizes)
        if self.damaged:
            first = ", ".join(self.damaged[:3]) + (", ..." if len(self.damaged) > 3 else "")
            log.warning("%s: %d damaged photos are left out (%s)", self.name, len(self.damaged), first)
        captioned = self.captions.names()
        without = [photo.name for photo in self.photos if photo.name not in captioned]
        count, total = len(self.photos) - len(without), len(self.photos)
        if without:
            log.warning("%s: %d of %d photos have a caption (none for %s)", self.name, count, total, without[0])
        else:
            log.info("%s: %d of %d photos have a caption", self.name, count, total)


def open_sets(folders: Folders, sets: Mapping[str, Mapping[str, Any]] | None = None) -> list[PhotoSet]:
    """Opens the sets of `folders`, then the named `sets` (arguments of `PhotoSet`) whose folder is not None.

    Raises:
        ValueError: there is neither a folder nor a set.
    """
    folders = [folders] if isinstance(folders, str | Path) else folders
    sets = {name: options for name, options in (sets or {}).items() if options.get("folder") is not None}
    if not folders and not sets:
        raise ValueError("no photos given; name at least one folder: data.folders=[PATH] or data.sets.NAME.folder=PATH")
    named = [PhotoSet(**options, name=name) for name, options in sets.items()]
    return [PhotoSet(folder) for folder in folders] + named


class Mixture:
    """The photo of every sample of an epoch, over sets of these `lengths` and `weights`.

    In every epoch a set of n photos with weight w has m = round(w n) samples: floor(m / n) times all its photos, then
    the next photos of an endless sequence of permutations. So all epochs have one length, and after k of them each
    photo has come k m / n times, rounded up or down. With weights of 1, sample i is photo i.

    Args:
        lengths: number of photos per set.
        weights: weight per set.
        seed: seed of the permutations.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seed: int):
        self.lengths, self.seed = lengths, seed
        self.samples = [round(length * weight) for length, weight in zip(lengths, weights, strict=True)]
        self.first_sample = list(accumulate(self.samples, initial=0))
        self.first_photo = list(accumulate(lengths, initial=0))

    def __len__(self) -> int:
        """Returns the number of samples in an epoch."""
        return self.first_sample[-1]

    def photo(self, index: int, epoch: int) -> int:
        """Returns the number of the photo that sample `index` of an epoch shows, counted over all sets in order."""
        place = bisect.bisect_right(self.first_sample, index) - 1
        length, within = self.lengths[place], index - self.first_sample[place]
        extra = self.samples[place] % length
        in_whole = self.samples[place] - extra
        if within < in_whole:
            return self.first_photo[place] + within % length
        number, at = divmod(epoch * extra + within - in_whole, length)
        return self.first_photo[place] + int(_permutation(self.seed, place, number, length)[at])


@functools.lru_cache(maxsize=32)
def _permutation(seed: int, place: int, number: int, length: int) -> torch.Tensor:
    """Returns permutation `number` of the sequence of the set at `place`."""
    return torch.randperm(length, generator=generator("cpu", seed, "extra", place, number))
