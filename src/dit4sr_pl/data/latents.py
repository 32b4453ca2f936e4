"""Training on latents that were encoded before the run: those of `prepare stage=latents`, or of the authors' scripts.

latent_hr/NAME.pt, latent_lr/NAME.pt                        scaled latents (1, C, h, w)
prompt_embeds/NAME.pt, pooled_prompt_embeds/NAME.pt         optional: prompt embeddings (1, T, D) and (1, D)
prompt_embeds/NULL_prompt_embeds.pt, pooled_prompt_embeds/NULL_pooled_prompt_embeds.pt    those of the empty prompt
"""

import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dit4sr_pl.common.randomness import generator
from dit4sr_pl.data.datasets import Draw
from dit4sr_pl.images.captions import open_captions

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
    ):
        folders = [Path(folder) for folder in ([folders] if isinstance(folders, str | Path) else folders)]
        self.embedded = all((folder / EMBEDS).is_dir() for folder in folders)
        if self.embedded and captions is not None:
            raise ValueError(f"data.captions={captions}: {folders[0]} has prompt embeddings; give one of them")
        self.items = [(folder, name) for folder in folders for name in names_in(folder, self.embedded)]
        self.captions = open_captions(captions) if captions is not None else None
        self.seed, self.empty_prompt_probability = seed, empty_prompt_probability
        first = latent_file(self.items[0][0], HR, self.items[0][1])
        self.shape, self.side = read_latent(first).shape, crop_size // PIXELS
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
        top, left = (int(torch.randint(n - self.side + 1, (), generator=draws)) for n in self.shape[1:])
        window = slice(None), slice(top, top + self.side), slice(left, left + self.side)
        files = {"clean": latent_file(folder, HR, name), "lr_latent": latent_file(folder, LR, name)}
        latents = {key: self.read(file)[window] for key, file in files.items()}
        return latents | {"position": draw.position, "name": name} | self.prompt(folder, name, empty)

    def read(self, path: Path) -> Tensor:
        """Returns latents `(C, h, w)`; raises ValueError if the file is damaged or they have another shape."""
        latent = read_latent(path)
        if latent.shape != self.shape:
            raise ValueError(f"{path}: latents of shape {tuple(latent.shape)}, the first ones have {tuple(self.shape)}")
        return latent

    def prompt(self, folder: Path, name: str, empty: bool) -> dict[str, Any]:
        """Returns the prompt of a sample, or its embeddings."""
        if not self.embedded:
            return {"prompt": "" if empty else self.caption(name)}
        names = ("NULL_prompt_embeds", "NULL_pooled_prompt_embeds") if empty else (name, name)
        files = (latent_file(folder, kind, stem) for kind, stem in zip((EMBEDS, POOLED), names, strict=True))
        return dict(zip(("embeds", "pooled"), map(read_latent, files), strict=True))

    def caption(self, name: str) -> str:
        """Returns the caption of latents, empty if there is none."""
        return "" if self.captions is None else self.captions[name]

    def prompts(self) -> set[str]:
        """Returns all prompts that need embeddings, the empty one included; none if the folders have embeddings."""
        return set() if self.embedded else {"", *(self.caption(name) for _, name in self.items)}

    def check(self) -> None:
        """Reads all captions, and logs how many latents there are.

        Raises:
            ValueError: a caption cannot be read.
        """
        without = 0 if self.embedded else sum(not self.caption(name) for _, name in self.items)
        level = logging.WARNING if without else logging.INFO
        log.log(level, "%d latents, %d of them without a caption", len(self), without)


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
                raise FileNotFoundError(f"{part}/NULL_{kind}.pt: no embeddings of the empty prompt")
            names.remove(f"NULL_{kind}")
        if not names:
            raise FileNotFoundError(f"{part}: no latents; run prepare stage=latents latents={folder}")
        found[kind] = names
        if alone := sorted(names ^ found[HR]):
            raise ValueError(f"{folder}: {HR} and {kind} differ in {len(alone)} names, such as {alone[0]}")
    return sorted(found[HR])


def latent_file(folder: Path, kind: str, name: str) -> Path:
    """Returns the file of one image's latents or embeddings."""
    return folder / kind / f"{name}.pt"


def read_latent(path: Path) -> Tensor:
    """Returns the tensor of a file in float32, without its batch dimension.

    Raises:
        ValueError: the file is damaged, or holds something other than one tensor with a batch dimension of 1.
    """
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(tensor, Tensor) or tensor.shape[:1] != (1,):
            raise TypeError("it holds something other than the tensor of one image")
    except (OSError, RuntimeError, EOFError, TypeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not read ({reason}); remove it and run prepare stage=latents again") from None
    return tensor[0].float()
