"""Sets of images to score: LR, ground truth and restored files that belong together by name.

Nothing here imports PyTorch before an image is read, so files that do not fit together are reported quickly.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dit4sr_pl.images.captions import drop_sentences, open_captions
from dit4sr_pl.images.files import image_size, read_image
from dit4sr_pl.images.pairs import by_name, check_pairs, check_sizes

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

SCALE = 4  # scale of the paper and of all its benchmarks


@dataclass(frozen=True)
class Item:
    """One image of a set.

    Args:
        name: path below its folder, without suffix.
        sr: file of the restored image, which may not exist yet.
        hr: file of the ground truth; None: no ground truth.
        lr: file of the LR image; None: `sr` is only scored.
        caption: caption of the LR image, may be empty.
        crop: side of centre crops of `hr` and `sr`, pixels; None: whole images.
    """

    name: str
    sr: Path
    hr: Path | None
    lr: Path | None = None
    caption: str = ""
    crop: int | None = None

    @property
    def side(self) -> int:
        """The shorter side of the restored image in pixels, from a file's header."""
        if self.lr is None:
            return min(image_size(self.sr))
        return self.crop or SCALE * min(image_size(self.lr))

    def read_lr(self) -> Tensor:
        """Reads the LR image, `(1, 3, h, w)` in 0..1."""
        return read(self.lr, self.crop and self.crop // SCALE)

    def read_hr(self) -> Tensor | None:
        """Reads the ground truth, `(1, 3, H, W)` in 0..1; None without ground truth."""
        return None if self.hr is None else read(self.hr, self.crop, SCALE)

    def read_sr(self) -> Tensor:
        """Reads the restored image, `(1, 3, H, W)` in 0..1."""
        return read(self.sr)


class BenchmarkSet:
    """LR images and, by name, their ground truth four times as large.

    Args:
        name: name by which results are compared.
        folder: folder that `lr` and `hr` are relative to.
        lr: folder of LR images.
        hr: folder of ground truth; None: the set has none.
        lr_suffix: ending of LR names that is not part of the name, such as RealSR's `_LR4`; files without it are
            skipped, so that both kinds may lie in one folder.
        hr_suffix: the same for ground truth.
        crop: side of centre crops of the ground truth, pixels; None: whole images.
        captions: folder of `.txt` files or a table (parquet, jsonl), by name; None: no captions.
        count: number of images in the whole set; None: unknown.
        dropped_words: sentences of captions that contain one of these words are left out.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: no image has a caption; or names have no partner or sizes do not fit, and the message lists every
            file concerned.
    """

    def __init__(
        self,
        name: str,
        folder: str,
        lr: str,
        hr: str | None,
        lr_suffix: str = "",
        hr_suffix: str = "",
        crop: int | None = None,
        captions: str | None = None,
        count: int | None = None,
        dropped_words: Iterable[str] = (),
    ):
        self.name, self.crop, self.count = name, crop, count
        self.lr = by_name(Path(folder) / lr, lr_suffix)
        self.hr = None if hr is None else by_name(Path(folder) / hr, hr_suffix)
        read = self.read_captions(captions)
        self.captions = {name: drop_sentences(caption, dropped_words) for name, caption in read.items()}
        if self.hr is not None:
            check_pairs(self.lr, self.hr)
            check_sizes(self.lr, self.hr, SCALE)
        self.check_crop()

    def read_captions(self, source: str | None) -> dict[str, str]:
        """Returns the captions by image, and warns of images without one.

        Raises:
            ValueError: no image has a caption.
        """
        if source is None:
            return dict.fromkeys(self.lr, "")
        captions = open_captions(source)
        known = captions.names()
        if missing := [name for name in self.lr if name not in known]:
            if len(missing) == len(self.lr):
                found = f"; there is one of {min(known)}" if known else ""
                raise ValueError(
                    f"dataset.captions={source}: no caption for any image of {self.name}, such as {missing[0]}{found}; "
                    "captions are named as images are, without dataset.lr_suffix"
                )
            log.warning(
                "dataset.captions=%s: %d of %d images have no caption (%s)",
                *(source, len(missing), len(self.lr), ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)),
            )
        return {name: captions[name] for name in self.lr}

    def items(self, restored: Path) -> list[Item]:
        """Returns the set's images, whose restored files are or will be PNG files in `restored`."""
        hr = self.hr or {}
        return [
            Item(name, restored / f"{name}.png", hr.get(name), lr, self.captions[name], self.crop)
            for name, lr in self.lr.items()
        ]

    def finished(self, images: Path) -> list[Item]:
        """Returns the set's images with existing restored files; errors are those of the set itself."""
        restored = by_name(images)
        check_pairs(restored, self.lr)
        if self.crop is None:
            check_sizes(self.lr, restored, SCALE)
        elif wrong := [str(path) for path in restored.values() if image_size(path) != (self.crop, self.crop)]:
            raise ValueError(
                f"not as large as dataset.crop={self.crop}: {', '.join(wrong)}; "
                "leave dataset.crop out, or restore them again"
            )
        return [replace(item, sr=restored[item.name]) for item in self.items(images)]

    def check_crop(self) -> None:
        """Raises ValueError unless the crop's side is a multiple of 4 and no larger than any image of the ground
        truth.
        """
        if self.crop is None:
            return
        if self.crop < SCALE or self.crop % SCALE:
            raise ValueError(f"dataset.crop={self.crop}: must be a multiple of {SCALE}, in pixels of the ground truth")
        small = [str(path) for path in self.lr.values() if min(image_size(path)) * SCALE < self.crop]
        if small:
            raise ValueError(
                f"dataset.crop={self.crop}: more than {SCALE} times the side of {', '.join(small)}; lower it"
            )


def finished_images(images: Path, reference: Path | None) -> list[Item]:
    """Returns restored images, each with the reference of its name and size; errors are those of `BenchmarkSet`."""
    restored = by_name(images)
    if reference is None:
        return [Item(name, path, None) for name, path in restored.items()]
    hr = by_name(reference)
    check_pairs(restored, hr)
    check_sizes(restored, hr, 1)
    return [Item(name, path, hr[name]) for name, path in restored.items()]


def read(path: Path, crop: int | None = None, step: int = 1) -> Tensor:
    """Reads an image or its centre crop, `(1, 3, H, W)` in 0..1; the crop's corner lies on a multiple of `step`."""
    image = read_image(path)[None] / 255
    if crop is None:
        return image
    top, left = (round((length - crop) / step / 2) * step for length in image.shape[-2:])
    return image[..., top : top + crop, left : left + crop]
