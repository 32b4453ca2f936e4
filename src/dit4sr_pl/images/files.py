"""Image files: finding, reading and writing them. This module alone decides what the pixels of a file are."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from dit4sr_pl.common.files import atomic_write

if TYPE_CHECKING:
    import torch

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff")
UNKNOWN_RANGE = "32-bit pixels; save it with 8 or 16 bits per channel"
PNG_BEGIN, PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB\x60\x82"
ROWS = 256  # rows of a large image that are processed at once
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF")  # some of Pillow's others start programs

# What a system answers about a good file: a disk or a server is in trouble, or the process has too many files open.
NOT_NOW = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.EAGAIN)
NOT_NOW += (errno.ENOTCONN, errno.EHOSTDOWN, errno.ECONNRESET, errno.EINTR)


ABSENT = (errno.ENOENT, errno.EACCES, errno.EPERM)  # nothing is known about the file's contents either


class UnreadableNow(ValueError):
    """An error of reading that says nothing about the file."""


def find_images(folder: Path | str, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Returns all images under `folder`, sorted by path, in any letter case of `suffixes`.

    Linked folders are entered unless they lead back up. Hidden files (unfinished writes, macOS's `._photo.jpg`) and
    hidden folders (`.thumbnails`) are skipped.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds no image.
    """
    found = [path for path in find_files(folder) if path.name.lower().endswith(tuple(suffixes))]
    if not found:
        raise ValueError(
            f"{folder}: no images in this folder or below it (looked for {', '.join(suffixes)}); give another folder"
        )
    return found


def find_files(folder: Path | str) -> list[Path]:
    """Returns all files under `folder`, sorted by path, as `find_images` finds its images.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the path of a folder of images")
    return sorted(Path(parent, name) for parent, names in _walk(folder) for name in names if not name.startswith("."))


def read_image(path: Path | str) -> torch.Tensor:
    """Reads the first picture of a file as uint8 RGB `(3, H, W)`, turned upright by its EXIF orientation.

    Grey is repeated over the channels; 16-bit grey is scaled to 8 bits; CMYK is converted without its colour profile;
    transparent pixels (alpha channel, palette entry, transparent colour) are laid over white.

    Raises:
        ValueError: the file is missing, damaged or no image, or has 32-bit pixels, whose range is unknown.
    """
    with open_image(path) as image:
        return rgb_pixels(image)


def rgb_pixels(image: Image.Image) -> torch.Tensor:
    """Returns uint8 RGB `(3, H, W)` of an opened image: upright, transparency over white, as in `read_image`."""
    import torch

    return torch.from_numpy(_to_rgb(image)).permute(2, 0, 1).contiguous()


def open_rgb(path: Path | str) -> Image.Image:
    """Returns the pixels of `read_image` as a Pillow image, without PyTorch; errors are those of `read_image`."""
    with open_image(path) as image:
        return Image.fromarray(_to_rgb(image))


def check_image(path: Path | str) -> tuple[int, int]:
    """Decodes a whole file without PyTorch and returns width and height in pixels; errors are those of `read_image`."""
    with open_image(path) as image:
        height, width, _ = _to_rgb(image).shape
    return width, height


def image_size(path: Path | str) -> tuple[int, int]:
    """Returns width and height in pixels, upright, from a file's header; raises ValueError for a file that is no
    image.
    """
    with open_image(path) as image:
        width, height = image.size
        # The base class's method: the PNG class's own would decode the pixels.
        turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) >= 5
    return (height, width) if turned else (width, height)


def write_image(path: Path | str, image: torch.Tensor) -> None:
    """Writes an RGB image `(3, H, W)` as an 8-bit PNG, clamped to 0..1 and rounded to the nearest level.

    The file appears under its name only when it is complete; missing folders are made.

    Args:
        path: a name that ends in `.png`.
        image: finite floats, `(3, H, W)`.

    Raises:
        ValueError: the name or the image is another.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: images are written as PNG; give a name that ends in .png")
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point() or not image.isfinite().all():
        raise ValueError(f"{path}: not a finite float image (3, H, W): {image.dtype} {tuple(image.shape)}")
    levels = (image.detach().float().clamp(0, 1) * 255).round().byte()
    with atomic_write(path) as partial:
        Image.fromarray(levels.permute(1, 2, 0).cpu().numpy()).save(partial, format="PNG")


def is_complete_png(path: Path | str) -> bool:
    """Returns whether a PNG file has its end; False too for no file and an empty one, which power cuts leave.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else, which must not be taken for a result, nor be replaced by one.
    """
    try:
        with Path(path).open("rb") as file:
            begin = file.read(len(PNG_BEGIN))
            if begin and begin != PNG_BEGIN:
                raise ValueError(f"{path}: exists and is no PNG; move it, or give overwrite=true")
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - len(PNG_END)))
            return file.read() == PNG_END
    except FileNotFoundError:
        return False


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields folders with the names of their files; hidden folders and links to a folder above are not entered."""
    above = {str(folder): {os.path.realpath(folder)}}
    for parent, folders, names in os.walk(folder, followlinks=True):
        yield parent, names
        entered = above.pop(parent)
        for name in list(folders):
            below = os.path.join(parent, name)
            if name.startswith(".") or (real := os.path.realpath(below)) in entered:
                folders.remove(name)
            else:
                above[below] = entered | {real}


@contextmanager
def open_image(path: Path | str) -> Iterator[Image.Image]:
    """Yields Pillow's image of a file, not decoded yet.

    Raises:
        UnreadableNow: the file is not there, or the system cannot read it, which does not mean that it is damaged.
        ValueError: the file is damaged or no image, or the block failed; the message names the file and the reason.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("not a file")  # reading a pipe would wait forever
        with Image.open(path, formats=[*FORMATS, *_plugins(path)]) as image:
            yield image
    except Exception as error:  # Pillow's decoders let nearly any exception through on a damaged file
        known = {UnidentifiedImageError: "unknown format", FileNotFoundError: "no such file"}
        known |= {MemoryError: "out of memory"}
        reason = known.get(type(error)) or str(error) or type(error).__name__
        if isinstance(error, OSError) and error.errno in NOT_NOW:
            raise UnreadableNow(f"{path}: cannot be read now ({error.strerror})") from None
        absent = isinstance(error, OSError) and error.errno in ABSENT
        reason = "may not be read" if absent and error.errno != errno.ENOENT else reason
        raise (UnreadableNow if absent else ValueError)(f"{path}: not a readable image ({reason})") from None


def _plugins(path: Path | str) -> list[str]:
    """Returns the format of a HEIC or JPEG XL file, which Pillow knows from now on; no format for other files.

    Raises:
        ValueError: the package for it is not installed.
    """
    with Path(path).open("rb") as file:
        head = file.read(32)
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        name, format, package = "JPEG XL", "JXL", "pillow_jxl"
    elif head[4:8] == b"ftyp" and head[8:11] in (b"hei", b"hev", b"mif", b"msf") and b"avif" not in head:
        name, format, package = "HEIC", "HEIF", "pillow_heif"
    else:
        return []
    if find_spec(package) is None:
        raise ValueError(f"{name} takes a package; pip install 'dit4sr_pl[formats]'")
    module = import_module(package)  # pillow_jxl registers itself
    if package == "pillow_heif":
        module.register_heif_opener()
    return [format]


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Returns uint8 `(H, W, 3)`, upright, contiguous and writable."""
    deep_grey = image.format == "PPM" and image.mode == "I"
    image = ImageOps.exif_transpose(image)
    if deep_grey:  # 16 bits, which Pillow opens in a mode of 32
        image = image.convert("I;16")
    if image.mode in ("I", "F"):
        raise ValueError(UNKNOWN_RANGE)
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 instead of scaling.
        grey = np.rint(np.asarray(image, dtype=np.float32) / 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def bands(height: int) -> Iterator[slice]:
    """Yields the rows of an image from top to bottom, `ROWS` at a time, so that no second image is held."""
    for top in range(0, height, ROWS):
        yield slice(top, min(top + ROWS, height))
