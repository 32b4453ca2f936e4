"""Named sets of photos: which photos, how often each comes, and where their captions are."""

import bisect
import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from dit4sr_pl.common.hashing import values_hash
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.data.manifest import MANIFEST, check_sizes, list_photos, read_manifest
from dit4sr_pl.images.captions import CaptionFiles, CaptionTable, open_captions
from dit4sr_pl.images.pairs import by_name, check_pairs
from dit4sr_pl.images.pairs import check_sizes as check_pair_sizes

log = logging.getLogger(__name__)

SCALE = 4  # HR pixels per LR pixel along one side

T, R = TypeVar("T"), TypeVar("R")
Folders = str | Path | Sequence[str | Path]


class Photo(NamedTuple):
    """An HR training image: its folder, its path below that, its set's captions, and its LR image if one is given."""

    folder: Path
    file: str  # path below the folder, with `/`
    captions: CaptionFiles | CaptionTable
    lr: Path | None = None  # None: LR images are made from the photo

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
            raise ValueError(
                f"{self.name}: weight={weight} of {len(files)} photos: fewer than one per epoch; give a larger weight"
            )

    def _files(self, path: str | Path | None, limit: int | None) -> tuple[list[str], list[int] | None, list[str]]:
        if path is None and not (self.folder / MANIFEST).exists():
            return list_photos(self.folder)[:limit], None, []
        path = Path(path or self.folder / MANIFEST)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such folder; give the path of the photos that {path} lists")
        listed = read_manifest(path, limit)
        if not listed.files:
            raise ValueError(
                f"{path}: no readable photo in this manifest; repair the photos and run prepare stage=manifest"
            )
        return listed

    def check(self) -> dict[str, str]:
        """Reads every file's size and all captions; logs damaged photos and the number of captions. No photo is opened.

        Returns:
            What identifies the photos and the captions: their number and a hash of names with sizes, or with texts.

        Raises:
            ValueError: a photo is missing, may not be read or has another size than in the manifest, or a caption
                cannot be read.
        """
        files = [photo.file for photo in self.photos]
        sizes = check_sizes(self.folder, files, self.sizes)
        empty = [file for file, size in zip(files, sizes, strict=True) if not size]
        for what, names in (("damaged photos are left out", self.damaged), ("photos are empty, and skipped", empty)):
            if names:
                first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                log.warning("%s: %d %s (%s)", self.name, len(names), what, first)
        captions = read_captions(self.photos)
        captioned = self.captions.names()
        without = [photo.name for photo in self.photos if photo.name not in captioned]
        count, total = len(self.photos) - len(without), len(self.photos)
        if without:
            log.warning("%s: %d of %d photos have a caption (none for %s)", self.name, count, total, without[0])
        else:
            log.info("%s: %d of %d photos have a caption", self.name, count, total)
        return {
            f"photos of {self.name}": fingerprint(zip(files, sizes, strict=True)),
            f"captions of {self.name}": fingerprint(zip(files, captions, strict=True)),
        }


def fingerprint(rows: Iterable[tuple[str, ...]]) -> str:
    """Returns the number of rows and a hash of them in their order, as a person may read it."""
    rows = list(rows)
    return f"{len(rows)} ({values_hash({'rows': rows})[:12]})"


def read_captions(photos: Sequence[Photo]) -> list[str]:
    """Returns the captions of all photos, read side by side.

    Raises:
        ValueError: captions cannot be read; the message names the first few files.
    """
    return side_by_side(lambda photo: photo.prompt, photos)


def side_by_side(read: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Returns the results of a function that reads files, which threads call.

    Raises:
        ValueError: files cannot be read; the message has the first few errors.
    """

    def attempt(item: T) -> R | Exception:
        try:
            return read(item)
        except (ValueError, OSError) as error:
            return error

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(attempt, items))
    if failures := [str(each) for each in results if isinstance(each, Exception)]:
        more = f"; and {len(failures) - 3} more" if len(failures) > 3 else ""
        raise ValueError("; ".join(failures[:3]) + more)
    return results


class PairSet(PhotoSet):
    """The HR photos of a folder with their given LR images, matched by name, such as RealSR's.

    Args:
        lr: folder of the LR images, at any depth.
        hr: folder of the HR photos, which may be the same; captions belong to them.
        name: the set's name in messages.
        lr_suffix: ending of LR names that is not part of the name, such as `_LR4`; files without it are skipped.
        hr_suffix: the same for HR names, such as `_HR`.
        limit: see `PhotoSet`.
        weight: see `PhotoSet`.
        captions: see `PhotoSet`.

    Raises:
        FileNotFoundError: a folder or the captions do not exist.
        ValueError: an image has no partner, or a number is out of range.
    """

    def __init__(
        self,
        lr: str | Path,
        hr: str | Path,
        name: str,
        lr_suffix: str = "",
        hr_suffix: str = "",
        limit: int | None = None,
        weight: float = 1.0,
        captions: str | Path | None = None,
    ):
        self.lr, self.hr = by_name(Path(lr), lr_suffix), by_name(Path(hr), hr_suffix)
        check_pairs(self.lr, self.hr)
        super().__init__(hr, name, limit, weight, captions)
        partners = [self.lr[name] for name in self.hr]
        self.photos = [photo._replace(lr=path) for photo, path in zip(self.photos, partners, strict=False)]

    def _files(self, path: None, limit: int | None) -> tuple[list[str], None, list[str]]:
        return [path.relative_to(self.folder).as_posix() for path in self.hr.values()][:limit], None, []

    def check(self) -> dict[str, str]:
        """Checks in the files' headers that every photo is 4 times as large as its LR image; then as `PhotoSet`."""
        check_pair_sizes(self.lr, self.hr, SCALE)
        given = [(photo.name, photo.lr.stat().st_size) for photo in self.photos]
        return super().check() | {f"LR images of {self.name}": fingerprint(given)}


def open_sets(
    folders: Folders,
    sets: Mapping[str, Mapping[str, Any]] | None = None,
    pairs: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[PhotoSet]:
    """Opens the sets of `folders`, then named `sets` (arguments of `PhotoSet`) and `pairs` (of `PairSet`).

    A set whose folder is None and pairs whose `hr` is None are left out.

    Raises:
        ValueError: nothing is left.
    """
    folders = [folders] if isinstance(folders, str | Path) else folders
    named = [PhotoSet(**options, name=name) for name, options in (sets or {}).items() if options.get("folder")]
    paired = [PairSet(**options, name=name) for name, options in (pairs or {}).items() if options.get("hr")]
    if not folders and not named and not paired:
        raise ValueError(
            "no photos given; name at least one folder: data.folders=[PATH], data.sets.NAME.folder=PATH, or "
            "data.pairs.NAME.lr=PATH data.pairs.NAME.hr=PATH"
        )
    return [PhotoSet(folder) for folder in folders] + named + paired


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
