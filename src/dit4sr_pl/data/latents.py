"""Training on latents that were encoded before the run: those of `prepare stage=latents`, or of the authors' scripts.

latent_hr/NAME.pt, latent_lr/NAME.pt                        scaled latents (1, C, h, w)
prompt_embeds/NAME.pt, pooled_prompt_embeds/NAME.pt         optional: prompt embeddings (1, T, D) and (1, D)
prompt_embeds/NULL_prompt_embeds.pt, pooled_prompt_embeds/NULL_pooled_prompt_embeds.pt    those of the empty prompt
"""

import json
import logging
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from dit4sr_pl.common.hashing import values_hash, weights_hash
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.data.datasets import TOKEN, Draw
from dit4sr_pl.data.photo_sets import fingerprint, side_by_side
from dit4sr_pl.images.captions import open_captions

RECORD = "latents.json"  # what `prepare stage=latents` encoded with
PIXELS = 8  # pixels per latent along one side
HR, LR, EMBEDS, POOLED = "latent_hr", "latent_lr", "prompt_embeds", "pooled_prompt_embeds"

log = logging.getLogger(__name__)


class LatentPairs(Dataset):
    """Latents of HR images and of their enlarged LR images. The sample of a `Draw` is a dict:

    - `clean`, `lr_latent`: float32 `(C, crop_size/8, crop_size/8)`, the same random place of both where they are larger
    - `position`: position of the draw
    - `name`: path below `latent_hr`, without suffix
    - `prompt`: the caption, empty with `empty_prompt_probability`
    - in the place of `prompt`, if the folders have prompt embeddings, `embeds` `(T, D_text)` and `pooled` `(D_pooled)`

    Args:
        folders: folders of latents, one or several of one kind.
        captions: folder of `.txt` files or table with the captions by name; None: no captions.
        crop_size: side of the crops, pixels.
        seed: seed of the draws.
        empty_prompt_probability: probability of an empty prompt.
        in_memory: whether all latents are read now and kept, in the dtype of their files, which may then hold several
            images `(N, C, h, w)` each.

    Raises:
        FileNotFoundError: a folder lacks one of its parts.
        ValueError: latents have no partner or no embeddings, or are smaller than a crop.
    """

    def __init__(
        self,
        folders: str | Path | Sequence[str | Path],
        captions: str | Path | None,
        crop_size: int,
        seed: int,
        empty_prompt_probability: float,
        in_memory: bool = False,
    ):
        folders = [Path(folder) for folder in ([folders] if isinstance(folders, str | Path) else folders)]
        self.embedded = all((folder / EMBEDS).is_dir() for folder in folders)
        if self.embedded and captions is not None:
            raise ValueError(f"data.captions={captions}: {folders[0]} has prompt embeddings; give one of them")
        self.items = [(folder, name) for folder in folders for name in names_in(folder, self.embedded)]
        self.captions = open_captions(captions) if captions is not None else None
        self.seed, self.empty_prompt_probability = seed, empty_prompt_probability
        self.memory: dict[str, Tensor] | None = None
        if in_memory:
            self.items, self.memory = read_all(self.items)
        first = latent_file(*self.items[0], kind=HR)
        self.shape = (self.memory[HR][0] if in_memory else read_latent(first)).shape
        self.side = crop_size // PIXELS
        if min(self.shape[1:]) < self.side:
            side = PIXELS * min(self.shape[1:])
            raise ValueError(f"data.crop_size={crop_size}: {first} is of {side} pixels; give data.crop_size={side}")

    def __len__(self) -> int:
        """Returns the number of samples in an epoch."""
        return len(self.items)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        folder, name = self.items[draw.index]
        draws = generator("cpu", self.seed, "sample", draw.index, draw.epoch)
        empty = torch.rand((), generator=draws).item() < self.empty_prompt_probability
        side = draw.crop or self.side
        top, left = (int(torch.randint(n - side + 1, (), generator=draws)) for n in self.shape[1:])
        window = slice(None), slice(top, top + side), slice(left, left + side)
        kinds = {"clean": HR, "lr_latent": LR}
        latents = {key: self.latent(draw.index, kind)[window].float() for key, kind in kinds.items()}
        return latents | {"position": draw.position, "name": name} | self.prompt(folder, name, empty)

    def latent(self, index: int, kind: str) -> Tensor:
        """Returns latents `(C, h, w)`; raises ValueError if their file is damaged or they have another shape."""
        if self.memory is not None:
            return self.memory[kind][index]
        path = latent_file(*self.items[index], kind=kind)
        latent = read_latent(path)
        if latent.shape != self.shape:
            raise ValueError(
                f"{path}: latents of shape {tuple(latent.shape)}, the first ones have {tuple(self.shape)}; remove it"
            )
        return latent

    def prompt(self, folder: Path, name: str, empty: bool) -> dict[str, Any]:
        """Returns the prompt of a sample, or its embeddings."""
        if not self.embedded:
            return {"prompt": "" if empty else self.caption(name)}
        names = ("NULL_prompt_embeds", "NULL_pooled_prompt_embeds") if empty else (name, name)
        files = (latent_file(folder, stem, kind) for kind, stem in zip((EMBEDS, POOLED), names, strict=True))
        return dict(zip(("embeds", "pooled"), map(read_latent, files), strict=True))

    def caption(self, name: str) -> str:
        """Returns the caption of latents, empty if there is none."""
        return "" if self.captions is None else self.captions[name]

    def prompts(self) -> set[str]:
        """Returns all prompts that need embeddings, the empty one included; none if the folders have embeddings."""
        return set() if self.embedded else {"", *(self.caption(name) for _, name in self.items)}

    @property
    def folders(self) -> list[Path]:
        """The folders of the latents, sorted."""
        return sorted({folder for folder, _ in self.items})

    def listing(self) -> str:
        """Returns what must be the same on all devices: number and hash of the names, in their order."""
        return fingerprint((name,) for _, name in self.items)

    def check(self) -> dict[str, str]:
        """Reads all captions and the end of every file, and logs how many latents there are.

        Returns:
            What identifies latents and captions: their number and a hash of names with the files' ends, which have
            the checksums of their contents, or with texts.

        Raises:
            ValueError: a caption cannot be read, or a file is cut off.
        """
        kinds = (HR, LR, EMBEDS, POOLED) if self.embedded else (HR, LR)
        files = {
            path: path.relative_to(folder).as_posix()
            for folder in self.folders
            for kind in kinds
            for path in sorted((folder / kind).rglob("*.pt"))
        }
        ends = side_by_side(end_of_archive, files)
        captions = [] if self.embedded else side_by_side(self.caption, [name for _, name in self.items])
        without = sum(not caption for caption in captions)
        level = logging.WARNING if without else logging.INFO
        log.log(level, "%d latents, %d of them without a caption", len(self), without)
        return {
            "latents": fingerprint(zip(files.values(), ends, strict=True)),
            "captions": fingerprint((c,) for c in captions),
        }


def names_in(folder: Path, embedded: bool) -> list[str]:
    """Returns the names of the latents in a folder, sorted.

    Raises:
        FileNotFoundError: a part of the folder is missing or empty.
        ValueError: parts do not have the same names.
    """
    found = {}
    for kind in (HR, LR, EMBEDS, POOLED) if embedded else (HR, LR):
        part = folder / kind
        names = {path.relative_to(part).with_suffix("").as_posix() for path in part.rglob("*.pt")}
        if kind in (EMBEDS, POOLED):
            if f"NULL_{kind}" not in names:
                raise FileNotFoundError(
                    f"{part}/NULL_{kind}.pt: no embeddings of the empty prompt; copy the folder again"
                )
            names.remove(f"NULL_{kind}")
        if not names:
            raise FileNotFoundError(f"{part}: no latents; run prepare stage=latents latents={folder}")
        found[kind] = names
        if alone := sorted(names ^ found[HR]):
            raise ValueError(
                f"{folder}: {HR} and {kind} differ in {len(alone)} names, such as {alone[0]}; "
                "run prepare stage=latents again"
            )
    return sorted(found[HR])


def latent_file(folder: Path, name: str, kind: str) -> Path:
    """Returns the file of one image's latents or embeddings."""
    return folder / kind / f"{name}.pt"


def read_all(items: Sequence[tuple[Path, str]]) -> tuple[list[tuple[Path, str]], dict[str, Tensor]]:
    """Returns the file of every image, and all latents `(N, C, h, w)` by kind.

    Raises:
        ValueError: a file is damaged, or its latents do not fit the others.
    """
    owners, pieces = [], {HR: [], LR: []}
    for folder, name in items:
        for kind, read in pieces.items():
            path = latent_file(folder, name, kind)
            read.append(read_file(path, several=True))
            shape, expected = read[-1].shape, (len(pieces[HR][-1]), *pieces[HR][0].shape[1:])
            if len(shape) != 4 or shape != expected:
                raise ValueError(
                    f"{path}: latents of shape {tuple(shape)}; they must have {tuple(expected)}; "
                    "remove it and run prepare again"
                )
        owners += [(folder, name)] * len(read[-1])
    return owners, {kind: torch.cat(read) for kind, read in pieces.items()}


def read_latent(path: Path) -> Tensor:
    """Returns the tensor of one image in float32, without its batch dimension; errors are those of `read_file`."""
    return read_file(path, several=False)[0].float()


def read_file(path: Path, several: bool) -> Tensor:
    """Returns the tensor of a file, of one or several images.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(tensor, Tensor) or not (several or tensor.shape[:1] == (1,)):
            raise TypeError(f"it holds something other than the tensor of {'images' if several else 'one image'}")
    except (OSError, RuntimeError, EOFError, TypeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not read ({reason}); remove it and run prepare stage=latents again") from None
    return tensor


def read_record(folder: Path) -> dict[str, Any]:
    """Returns what the latents in a folder were encoded with; {}: they are the authors' or of before 0.2.

    Raises:
        ValueError: the record is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict):
            return record
    except ValueError:
        pass
    raise ValueError(f"{path}: damaged; remove it if you know what these latents were encoded with")


def check_autoencoder(folders: Sequence[Path], vae: str | None, name: str) -> None:
    """Raises ValueError if latents were encoded with another autoencoder; what is not known is not compared.

    Args:
        folders: folders of latents.
        vae: fingerprint of the backbone's autoencoder.
        name: the backbone's name, for the message.
    """
    for folder in folders:
        if vae is not None and read_record(folder).get("vae", vae) != vae:
            raise ValueError(
                f"{folder}: latents of another autoencoder than the vae of {name}; encode them again into another "
                "folder, or give the backbone that they were encoded with"
            )


def end_of_archive(path: Path) -> str:
    """Returns the hash of the end of a file that PyTorch wrote: the list of its contents with their checksums.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is cut off, or something else.
    """
    with path.open("rb") as file:
        if zipfile.is_zipfile(file):
            with suppress(zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
                return values_hash({entry.filename: [entry.file_size, entry.CRC] for entry in archive.infolist()})
    return weights_hash({"latents": read_file(path, several=True)})  # PyTorch's format of before 1.6, or an error


class CropSizes(Sampler[list[Draw]]):
    """The batches of another sampler, each with one crop size, which is a function of the seed and its first position.

    Larger crops are fewer: all batches have about as many latents as one of the smallest crops.

    Args:
        batches: the other sampler.
        crops: sides of crops in pixels, each with its share of the batches.
        shape: shape of the whole latents, `(C, h, w)`.
        seed: seed of the sizes.

    Raises:
        ValueError: a side is no multiple of 16 pixels, or is larger than the latents; or no share is positive.
    """

    def __init__(
        self, batches: Iterable[list[Draw]], crops: Sequence[tuple[int, float]], shape: Sequence[int], seed: int
    ):
        sides, shares = ([pair[i] for pair in crops] for i in (0, 1))
        largest = PIXELS * min(shape[1:])
        if wrong := [side for side in sides if side % TOKEN or not 0 < side <= largest]:
            raise ValueError(
                f"data.latent_crops: {wrong[0]} is no multiple of {TOKEN} pixels up to {largest}; give such sides"
            )
        if not shares or min(shares) < 0 or not sum(shares):
            raise ValueError(f"data.latent_crops={crops}: give sides and shares, such as [[128,0.7],[256,0.3]]")
        self.sides, self.shares = [side // PIXELS for side in sides], torch.tensor(shares, dtype=torch.float32)
        self.batches, self.seed = batches, seed

    def __iter__(self) -> Iterator[list[Draw]]:
        for batch in self.batches:
            draws = generator("cpu", self.seed, "crop size", batch[0].position)
            side = self.sides[int(torch.multinomial(self.shares, 1, generator=draws))]
            count = max(1, len(batch) * min(self.sides) ** 2 // side**2)
            yield [draw._replace(crop=side) for draw in batch[:count]]
