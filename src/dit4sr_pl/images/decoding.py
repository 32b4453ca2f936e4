"""Pixels of files that Pillow would reduce to 8 bits, and checks of headers."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from dit4sr_pl.images.files import UNKNOWN_RANGE
from dit4sr_pl.images.metadata import check_transfer

GREY_MODES = ("1", "L", "LA", "La")
IMAGE_WIDTH, IMAGE_LENGTH, BITS_PER_SAMPLE, TILE_WIDTH, TILE_LENGTH = 256, 257, 258, 322, 323
IMAGE_DEPTH, TILE_DEPTH, DNG_VERSION = 32997, 32998, 50706
LARGEST_TILE = 2**24  # pixels of a TIFF's tile


def check_kind(image: Image.Image, path: Path | str, first_frame: bool) -> None:
    """Checks an opened file's header.

    Args:
        image: the file, opened by Pillow.
        path: its path.
        first_frame: whether the first of several frames or pages is wanted.

    Raises:
        ValueError: the header shows that the file cannot be restored.
    """
    # The further pictures of an MPO, which phones write as .jpg, are previews and depth maps.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1 and not first_frame:
        raise ValueError(f"{frames} frames or pages; first_frame=true restores the first")
    if image.mode == "F":
        raise ValueError(UNKNOWN_RANGE)
    if image.format == "TIFF":
        _check_tiff(image)
    if image.format in ("AVIF", "HEIF"):
        check_transfer(path)


def is_deep(image: Image.Image) -> bool:
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
    if image.format == "JXL":
        return image.mode == "I;16"
    return image.format == "PNG" and ";16" in str(image.tile[0].args)


def deep_levels(path: Path | str, image: Image.Image, upright: Image.Image, orientation: int) -> np.ndarray:
    """Returns uint16 `(H, W)` or `(H, W, C)` of a file with 16 bits per channel, upright."""
    if image.format in ("PPM", "JXL"):
        return np.asarray(upright, np.uint16)
    if image.format == "PNG":
        import imagecodecs

        return _turned(imagecodecs.png_decode(Path(path).read_bytes()), orientation)
    size = image.tag_v2[IMAGE_WIDTH], image.tag_v2[IMAGE_LENGTH]  # Pillow's own may be turned already
    return _turned(_tiff_levels(path, size), orientation)


def plain_levels(image: Image.Image, profile: ImageCms.ImageCmsProfile | None) -> np.ndarray:
    """Returns uint8 levels of an 8-bit image: grey or RGB, with or without alpha."""
    if image.mode[0] in "IF":
        raise ValueError(UNKNOWN_RANGE)
    if image.mode == "CMYK" and profile is not None:
        srgb = ImageCms.createProfile("sRGB")
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        return np.asarray(ImageCms.profileToProfile(image, profile, srgb, intent, "RGB", flags=flags))
    alpha = "A" if image.has_transparency_data else ""
    return np.asarray(image.convert(("L" if image.mode in GREY_MODES else "RGB") + alpha))


def _check_tiff(image: Image.Image) -> None:
    tags = image.tag_v2
    if DNG_VERSION in tags:
        raise ValueError("a camera's raw file (DNG); develop it and save it as TIFF or PNG")
    if max(tags.get(IMAGE_DEPTH, 1), tags.get(TILE_DEPTH, 1)) > 1:
        raise ValueError("a TIFF that holds a volume; save its slices as images")
    width, length = tags.get(TILE_WIDTH, 0), tags.get(TILE_LENGTH, 0)
    if width * length > max(LARGEST_TILE, image.width * image.height):
        raise ValueError(f"a TIFF of {image.width}x{image.height} pixels in tiles of {width}x{length}; save it anew")


def _tiff_levels(path: Path | str, size: tuple[int, int]) -> np.ndarray:
    """Returns uint16 levels of a TIFF's first page, as stored in the file.

    Args:
        path: the file.
        size: width and height that Pillow reads in its header; tifffile must agree before it makes room for them.
    """
    import tifffile

    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        kind, extra, shape = page.photometric.name, page.extrasamples, dict(zip(page.axes, page.shape, strict=True))
        if page.dtype != np.uint16 or kind not in ("MINISBLACK", "MINISWHITE", "RGB") or len(extra) > 1:
            what = f"kind {kind} {page.dtype} with {len(extra)} extra samples"
            raise ValueError(f"16-bit TIFF of {what}; save it as RGB or grey")
        samples, expected = shape.pop("S", 1), len(extra) + (3 if kind == "RGB" else 1)
        if (shape.pop("X", 1), shape.pop("Y", 1)) != size or shape or samples != expected:
            raise ValueError(f"16-bit TIFF of shape {page.shape} whose header says {size[0]}x{size[1]}; save it anew")
        levels = page.asarray().reshape(page.shape)
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
