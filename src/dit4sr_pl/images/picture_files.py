"""Files of pictures as restoring reads and writes them: with alpha, bit depth and metadata; grey stays grey."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import putchunk

from dit4sr_pl.common.files import atomic_write
from dit4sr_pl.images.decoding import check_kind, deep_levels, is_deep, plain_levels
from dit4sr_pl.images.encoding import encode
from dit4sr_pl.images.files import bands, open_image
from dit4sr_pl.images.metadata import (
    ORIENTATION,
    carried_exif,
    carried_xmp,
    color_chunks,
    dpi_of,
    has_gain_map,
    iptc_of,
    profile_of,
    resized_exif,
    text_of,
)
from dit4sr_pl.images.picture import Picture

if TYPE_CHECKING:
    from torch import Tensor

DEEP_FORMATS = ("png", "tiff")  # formats of results that keep 16 bits per channel


def read_picture(path: Path | str, first_frame: bool = False) -> Picture:
    """Reads a whole file.

    PNG, TIFF and PGM keep 16 bits per channel. CMYK becomes 8-bit sRGB through its profile, which is then dropped.

    Args:
        path: the file.
        first_frame: whether the first of several frames or pages is wanted.

    Raises:
        ValueError: the file is missing, damaged or no image; it has 32-bit pixels, whose range is unknown, a PPM's
            16, or more pixels than Pillow thinks safe (89 million); its colours are HDR that Pillow cannot read; it is
            a TIFF of a kind that is not understood; it has several frames or pages and `first_frame` is False.
    """
    with _noted() as notes:
        with open_image(path) as image:
            image.verify()  # a PNG's checksums, which decoding does not check
        with open_image(path) as image:
            check_kind(image, path, first_frame)
            deep, exif = is_deep(image), image.getexif()
            if image.format == "JXL" and not image.jpeg:  # turned by its decoder
                exif.pop(ORIENTATION, None)
                image.info.pop("exif", None)
            orientation, icc = exif.get(ORIENTATION, 1), image.info.get("icc_profile")
            upright = ImageOps.exif_transpose(image)  # decodes at 8 bits, so that damage shows here
            profile = profile_of(icc, notes)
            if deep:
                levels = deep_levels(path, image, upright, orientation)
            else:
                levels = plain_levels(upright, profile)
            if image.format in ("JPEG", "MPO", "HEIF", "AVIF") and has_gain_map(path):
                notes.append("its HDR gain map is left out; the result is SDR")
            metadata = {
                "icc": None if profile is None or image.mode == "CMYK" else icc,
                "exif": carried_exif(exif, notes),
                "xmp": carried_xmp(image.info.get("xmp"), notes),
                "iptc": iptc_of(image),
                "dpi": dpi_of(image, orientation >= 5),
                "text": tuple(text_of(image).items()),
                "chunks": color_chunks(path) if image.format == "PNG" else (),
            }
    color, alpha = _planes(levels)
    return Picture(color, alpha, 16 if deep else 8, notes=tuple(dict.fromkeys(notes)), **metadata)


class Header(NamedTuple):
    """Height and width before the picture is turned upright, and whether it has alpha."""

    size: tuple[int, int]
    alpha: bool


def read_header(path: Path | str, first_frame: bool = False) -> Header:
    """Reads a file's header; nothing is decoded.

    Raises:
        ValueError: `read_picture` would refuse the file for something that its header shows.
    """
    with _noted(), open_image(path) as image:
        check_kind(image, path, first_frame)
        return Header((image.height, image.width), image.has_transparency_data)


def write_picture(
    path: Path, picture: Picture, level: int | None = None, format: str = "png", quality: int | None = None
) -> list[str]:
    """Writes a picture, rounded to the nearest level, with as much of its metadata as the format holds.

    The file appears under its name only when it is complete; missing folders are made.

    Args:
        path: the file.
        picture: the picture.
        level: how hard to compress a PNG, 0 to 9; None: imagecodecs' own level.
        format: a key of `formats.RESULTS`.
        quality: of JPEG, WebP and AVIF, 1 to 100; None: 95.

    Returns:
        What the format cannot hold, a line each.

    Raises:
        ValueError: the picture has values that are not finite.
    """
    if format == "png":
        _write_png(path, picture, level)
        return []
    notes = []
    bits = picture.bits if format in DEEP_FORMATS else 8
    alpha = picture.alpha
    if alpha is not None and format == "jpeg":
        notes.append("its transparency is laid over white, since JPEG has none")
    levels = _levels(path, picture, bits, over_white=format == "jpeg")
    content = encode(levels, picture, format, quality, notes)
    with atomic_write(path) as partial:
        partial.write_bytes(content)
    return notes


def _write_png(path: Path, picture: Picture, level: int | None) -> None:
    import imagecodecs

    image = imagecodecs.png_encode(_levels(path, picture, picture.bits), level)
    header = 33  # signature and IHDR; metadata come between them and the pixels
    with atomic_write(path) as partial, partial.open("wb") as file:
        file.write(image[:header])
        for name, content in picture.chunks:
            putchunk(file, name, content)
        if picture.icc is not None:
            putchunk(file, b"iCCP", b"ICC profile\0\0", zlib.compress(picture.icc))
        if picture.dpi is not None:
            putchunk(file, b"pHYs", struct.pack(">IIB", *(round(number / 0.0254) for number in picture.dpi), 1))
        if picture.exif is not None:
            exif = resized_exif(picture.exif, tuple(picture.color.shape[-2:]))
            putchunk(file, b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
        texts = list(picture.text)
        if picture.xmp is not None:
            texts.append(("XML:com.adobe.xmp", picture.xmp.decode()))
        if picture.iptc is not None:  # a PNG has no place of its own for them; ExifTool and ImageMagick read this one
            texts.append(("Raw profile type iptc", f"\niptc\n{len(picture.iptc):8}\n{picture.iptc.hex()}\n"))
        for key, text in texts:
            keyword = key.encode("latin-1", "replace")
            putchunk(file, b"iTXt", keyword + bytes(5) + text.encode("utf-8", "replace"))
        file.write(image[header:])


def _levels(path: Path, picture: Picture, bits: int, over_white: bool = False) -> np.ndarray:
    """Returns uint8 or uint16 `(H, W, C)`, made band by band; `over_white`: alpha is laid over white."""
    import torch

    planes = [picture.color] if picture.alpha is None or over_white else [picture.color, picture.alpha]
    height, width = picture.color.shape[-2:]
    shape = height, width, sum(len(plane) for plane in planes)
    levels = np.empty(shape, np.uint16 if bits == 16 else np.uint8)
    for rows in bands(height):
        band = torch.cat([plane[:, rows] for plane in planes])
        if not band.isfinite().all():
            raise ValueError(f"{path}: the result is not finite; try model.backbone.dtype=float32")
        band.clamp_(0, 1)
        if over_white and picture.alpha is not None:
            alpha = picture.alpha[:, rows].clamp(0, 1)
            band = band * alpha + (1 - alpha)
        levels[rows] = band.mul_(2**bits - 1).round_().permute(1, 2, 0).cpu().numpy()
    return levels


@contextmanager
def _noted() -> Iterator[list[str]]:
    """Collects Pillow's warnings of the block as notes; its doubts about a picture's size become errors."""
    notes = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)  # metadata that Pillow skips
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield notes
    notes += [f"Pillow says: {' '.join(str(warning.message).split())}" for warning in caught]


def _planes(levels: np.ndarray) -> tuple[Tensor, Tensor | None]:
    """Returns colour and alpha in 0..1 from uint8 or uint16 `(H, W)` or `(H, W, C)`."""
    import torch

    top = np.float32(np.iinfo(levels.dtype).max)
    planes = np.atleast_3d(levels).transpose(2, 0, 1).astype(np.float32, order="C") / top
    colors = 1 if len(planes) < 3 else 3
    tensor = torch.from_numpy(planes)
    return tensor[:colors], tensor[colors:] if len(planes) > colors else None
