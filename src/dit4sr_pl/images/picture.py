"""Pictures as restoring reads and writes them: with alpha, bit depth, colour profile and EXIF data; grey stays grey."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps
from PIL.PngImagePlugin import putchunk

from dit4sr_pl.common.files import atomic_write
from dit4sr_pl.images.files import IMAGE_SUFFIXES, UNKNOWN_RANGE, bands, open_image

if TYPE_CHECKING:
    from torch import Tensor

PICTURE_SUFFIXES = (*IMAGE_SUFFIXES, ".bmp", ".gif", ".ppm", ".pgm")
GREY_MODES = ("1", "L", "LA", "La")
BITS_PER_SAMPLE, ORIENTATION = 258, ExifTags.Base.Orientation
# Tags of a TIFF that describe how its pixels are stored, or hold metadata that is carried otherwise.
STRUCTURE = {*range(254, 260), 262, 263, 266, 273, 277, 278, 279, 280, 281, 284, *range(288, 294), 297, 301, 317}
STRUCTURE |= {318, 319, 320, *range(322, 328), 330, 332, 334, 336, 338, 339, 340, 341, 347, *range(512, 533)}
STRUCTURE |= {700, 33723, 34377, 34675, 37724}


@dataclass(frozen=True)
class Picture:
    """The upright pixels of a file and its metadata.

    Args:
        color: `(1, H, W)` grey or `(3, H, W)` RGB in 0..1, float32, in the colour space of `icc`.
        alpha: `(1, H, W)` in 0..1; None: opaque.
        bits: bits per channel, 8 or 16.
        icc: the file's colour profile; None: sRGB.
        exif: the file's EXIF data without thumbnail, its orientation set to upright.
        notes: what could not be kept, a line each.
    """

    color: Tensor
    alpha: Tensor | None = None
    bits: int = 8
    icc: bytes | None = None
    exif: bytes | None = None
    notes: tuple[str, ...] = ()


def read_picture(path: Path | str, first_frame: bool = False) -> Picture:
    """Reads a whole file.

    PNG, TIFF and PGM keep 16 bits per channel. CMYK becomes 8-bit sRGB through its profile, which is then dropped.

    Args:
        path: the file.
        first_frame: whether the first of several frames or pages is wanted.

    Raises:
        ValueError: the file is missing, damaged or no image; it has 32-bit pixels, whose range is unknown, a PPM's
            16, or more pixels than Pillow thinks safe (89 million); it has several frames or pages and `first_frame`
            is False.
    """
    with _noted() as notes:
        with open_image(path) as image:
            image.verify()  # a PNG's checksums, which decoding does not check
        with open_image(path) as image:
            _check_frames(image, first_frame)
            deep, exif = _is_deep(image), image.getexif()
            orientation, icc = exif.get(ORIENTATION, 1), image.info.get("icc_profile")
            upright = ImageOps.exif_transpose(image)  # decodes at 8 bits, so that damage shows here
            profile = None if icc is None else _profile(icc, notes)
            if deep:
                levels = np.asarray(upright, np.uint16) if image.format == "PPM" else _deep_levels(path, image.format)
                levels = _turned(levels, orientation)
            else:
                levels = np.asarray(_plain(upright, profile))
            exif = _carried(exif, notes)
    color, alpha = _planes(levels)
    icc = None if profile is None or image.mode == "CMYK" else icc
    return Picture(color, alpha, 16 if deep else 8, icc, exif, tuple(dict.fromkeys(notes)))


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
        _check_frames(image, first_frame)
        if image.mode == "F":
            raise ValueError(UNKNOWN_RANGE)
        return Header((image.height, image.width), image.has_transparency_data)


def write_picture(path: Path, picture: Picture, level: int | None = None) -> None:
    """Writes a PNG of the picture's depth, rounded to the nearest level, with its colour profile and EXIF data.

    The file appears under its name only when it is complete; missing folders are made.

    Args:
        path: the file.
        picture: the picture.
        level: how hard to compress, 0 to 9; None: imagecodecs' own level.

    Raises:
        ValueError: the picture has values that are not finite.
    """
    import imagecodecs

    image = imagecodecs.png_encode(_levels(path, picture), level)
    header = 33  # signature and IHDR; profile and EXIF come between them and the pixels
    with atomic_write(path) as partial, partial.open("wb") as file:
        file.write(image[:header])
        if picture.icc is not None:
            putchunk(file, b"iCCP", b"ICC profile\0\0", zlib.compress(picture.icc))
        if picture.exif is not None:
            putchunk(file, b"eXIf", _resized(picture.exif, *picture.color.shape[-2:]))
        file.write(image[header:])


def _levels(path: Path, picture: Picture) -> np.ndarray:
    """Returns uint8 or uint16 `(H, W, C)`, made band by band."""
    import torch

    planes = [picture.color] if picture.alpha is None else [picture.color, picture.alpha]
    height, width = picture.color.shape[-2:]
    shape = height, width, sum(len(plane) for plane in planes)
    levels = np.empty(shape, np.uint16 if picture.bits == 16 else np.uint8)
    for rows in bands(height):
        band = torch.cat([plane[:, rows] for plane in planes])
        if not band.isfinite().all():
            raise ValueError(f"{path}: the result is not finite; try model.backbone.dtype=float32")
        levels[rows] = (band.clamp_(0, 1) * (2**picture.bits - 1)).round_().permute(1, 2, 0).cpu().numpy()
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


def _check_frames(image: Image.Image, first_frame: bool) -> None:
    # The further pictures of an MPO, which phones write as .jpg, are previews and depth maps.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1 and not first_frame:
        raise ValueError(f"{frames} frames or pages; first_frame=true restores the first")


def _is_deep(image: Image.Image) -> bool:
    """Returns whether a file has 16 bits per channel, of which Pillow would mostly keep 8."""
    if image.mode == "CMYK":
        return False
    if image.format == "TIFF":
        return set(image.tag_v2.get(BITS_PER_SAMPLE, ())) == {16}
    if image.format == "PPM":
        mode, *white = image.tile[0].args if isinstance(image.tile[0].args, tuple) else (image.tile[0].args,)
        if mode == "RGB" and white and white[0] > 255:
            raise ValueError("PPM with more than 8 bits per channel, of which Pillow keeps 8; save it as PNG or TIFF")
        return image.mode == "I"
    return image.format == "PNG" and ";16" in str(image.tile[0].args)


def _deep_levels(path: Path | str, format: str) -> np.ndarray:
    """Returns uint16 `(H, W)` or `(H, W, C)` of a PNG or TIFF, as stored in the file."""
    if format == "PNG":
        import imagecodecs

        return imagecodecs.png_decode(Path(path).read_bytes())
    import tifffile

    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        levels, kind, extra = page.asarray(), page.photometric.name, page.extrasamples
    if levels.dtype != np.uint16 or kind not in ("MINISBLACK", "MINISWHITE", "RGB") or len(extra) > 1:
        raise ValueError(f"16-bit TIFF of kind {kind} {levels.dtype}; save it as RGB or grey")
    if page.axes.startswith("S"):
        levels = levels.transpose(1, 2, 0)
    if kind == "MINISWHITE":
        levels = 65535 - levels
    if extra and extra[0].name == "ASSOCALPHA":
        color, alpha = levels[..., :-1].astype(np.float64), levels[..., -1:]
        color = np.rint(np.divide(color * 65535, alpha, out=np.zeros_like(color), where=alpha > 0))
        levels = np.concatenate([color.clip(0, 65535).astype(np.uint16), alpha], axis=2)
    return levels[..., :-1] if extra and extra[0].name == "UNSPECIFIED" else levels


def _turned(levels: np.ndarray, orientation: int) -> np.ndarray:
    """Returns the levels upright, by EXIF's orientation."""
    if orientation in (5, 6, 7, 8):
        levels = levels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        levels = levels[::-1]
    return levels[:, ::-1] if orientation in (2, 3, 6, 7) else levels


def _plain(image: Image.Image, profile: ImageCms.ImageCmsProfile | None) -> Image.Image:
    """Returns an 8-bit image as L, LA, RGB or RGBA."""
    if image.mode[0] in "IF":
        raise ValueError(UNKNOWN_RANGE)
    if image.mode == "CMYK" and profile is not None:
        srgb = ImageCms.createProfile("sRGB")
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        return ImageCms.profileToProfile(image, profile, srgb, intent, "RGB", flags=flags)
    alpha = "A" if image.has_transparency_data else ""
    return image.convert(("L" if image.mode in GREY_MODES else "RGB") + alpha)


def _planes(levels: np.ndarray) -> tuple[Tensor, Tensor | None]:
    """Returns colour and alpha in 0..1 from uint8 or uint16 `(H, W)` or `(H, W, C)`."""
    import torch

    top = np.float32(np.iinfo(levels.dtype).max)
    planes = np.atleast_3d(levels).transpose(2, 0, 1).astype(np.float32, order="C") / top
    colors = 1 if len(planes) < 3 else 3
    tensor = torch.from_numpy(planes)
    return tensor[:colors], tensor[colors:] if len(planes) > colors else None


def _profile(icc: bytes, notes: list[str]) -> ImageCms.ImageCmsProfile | None:
    """Returns the parsed colour profile; a profile that cannot be read is noted and left out."""
    try:
        return ImageCms.ImageCmsProfile(BytesIO(icc))
    except OSError:
        notes.append("its colour profile cannot be read and is left out")
        return None


def _carried(exif: Image.Exif, notes: list[str]) -> bytes | None:
    """Returns EXIF data for an upright picture, without the thumbnail, which shows the LR image."""
    try:
        for tag in STRUCTURE & exif.keys():
            del exif[tag]
        if not exif:
            return None
        exif[ORIENTATION] = 1
        return exif.tobytes()
    except Exception as error:  # Pillow raises many kinds for malformed data
        notes.append(f"its EXIF data cannot be kept ({error})")
        return None


def _resized(exif: bytes, height: int, width: int) -> bytes:
    """Returns the EXIF data as a PNG stores it, with the sizes that it holds, if any, set to the picture's."""
    tags = Image.Exif()
    tags.load(exif)
    details = tags.get_ifd(ExifTags.IFD.Exif)
    for tag, length in ((ExifTags.Base.ExifImageWidth, width), (ExifTags.Base.ExifImageHeight, height)):
        if tag in details:
            details[tag] = length
    return tags.tobytes().removeprefix(b"Exif\0\0")
