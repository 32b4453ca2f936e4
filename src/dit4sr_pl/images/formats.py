"""Formats of image files: their suffixes, how a file's first bytes show its format, and when a result is complete."""

import struct
from collections.abc import Iterator
from pathlib import Path

from dit4sr_pl.images.files import find_files, is_complete_png

# Formats of results and their suffixes; the first one is that of a new file.
RESULTS = {
    "png": (".png",),
    "jpeg": (".jpg", ".jpeg", ".jpe", ".jfif", ".jif"),
    "webp": (".webp",),
    "tiff": (".tif", ".tiff"),
    "avif": (".avif",),
}
LOSSY = ("jpeg", "webp", "avif")  # formats that have a quality
LONGEST_SIDE = {"jpeg": 65500, "webp": 16383, "avif": 65535}  # pixels
ANIMATED = (".gif", ".apng", ".avifs", ".heics", ".heifs")
WITH_EXTRAS = (".heic", ".heif", ".hif", ".jxl")
PICTURE_SUFFIXES = sum(RESULTS.values(), ()) + (".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm", *ANIMATED, *WITH_EXTRAS)
# Raw files are TIFF inside and show a thumbnail to those who read them as such.
RAW = (".3fr", ".arw", ".cr2", ".cr3", ".dcr", ".dng", ".erf", ".iiq", ".k25", ".kdc", ".mef", ".mos", ".mrw", ".nef")
RAW += (".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f")
# Other files that people call images: they are named as not restored.
OTHERS = (".ai", ".bpg", ".cin", ".cur", ".dds", ".dpx", ".eps", ".exr", ".fits", ".flif", ".hdr", ".icns", ".ico")
OTHERS += (".j2c", ".j2k", ".jls", ".jp2", ".jpc", ".jpf", ".jpm", ".jpx", ".jxr", ".mng", ".pam", ".pcx", ".pfm")
OTHERS += (".psb", ".psd", ".qoi", ".sgi", ".svg", ".svgz", ".tga", ".wdp", ".wmf", ".xbm", ".xcf", ".xpm")
MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\0\0\0\x0cJXL ")
BRANDS = (b"avif", b"avis", b"mif1", b"msf1", b"heic", b"heix", b"hevc", b"heim", b"heis")


def find_pictures(folder: Path) -> tuple[list[Path], list[Path]]:
    """Returns the files below a folder that people call images, and the others, each sorted.

    A file is an image by its suffix, in any letter case, or by its first bytes. Hidden files and folders are skipped.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    pictures, others = [], []
    for path in find_files(folder):
        known = path.suffix.lower() in (*PICTURE_SUFFIXES, *RAW, *OTHERS)
        (pictures if known or _begins_like_an_image(path) else others).append(path)
    return pictures, others


def check_suffix(path: Path) -> None:
    """Raises ValueError for a camera's raw file."""
    if path.suffix.lower() in RAW:
        raise ValueError(f"{path}: a camera's raw file; develop it and save it as TIFF or PNG")


def check_sides(path: Path, size: tuple[int, int], format: str) -> None:
    """Raises ValueError if a format cannot hold a picture's result of this height and width."""
    longest = LONGEST_SIDE.get(format, max(size))
    if max(size) > longest:
        sides = f"{size[1]}x{size[0]} pixels, and sides of {format.upper()} have at most {longest}"
        raise ValueError(f"{path}: its result has {sides}; give format=png")


def result_format(path: Path, wanted: str) -> tuple[str, str]:
    """Returns format and suffix of a picture's result.

    Args:
        path: the picture's file.
        wanted: a format, or `same`: that of the file's suffix, or PNG if results cannot have it.
    """
    if wanted != "same":
        return wanted, RESULTS[wanted][0]
    for format, suffixes in RESULTS.items():
        if path.suffix.lower() in suffixes:
            return format, path.suffix
    return "png", ".png"


def is_complete(path: Path, format: str) -> bool:
    """Returns whether a result has its end; False too for no file and an empty one, which power cuts leave.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else, which must not be taken for a result, nor be replaced by one.
    """
    if format == "png":
        return is_complete_png(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return False
    begins, complete = {"jpeg": _jpeg, "webp": _webp, "tiff": _tiff, "avif": _avif}[format](data)
    if data and not begins:
        raise ValueError(f"{path}: exists and is no {format.upper()}; move it, or give overwrite=true")
    return bool(data) and complete


def boxes(data: bytes, begin: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """Yields the boxes of an AVIF, HEIC or JXL file: kind, where the content begins, where it ends.

    A box that is cut off ends behind the data; the boxes end there.
    """
    end = len(data) if end is None else end
    while begin + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, begin)
        head = 8
        if size == 1 and begin + 16 <= end:
            size, head = struct.unpack_from(">Q", data, begin + 8)[0], 16
        size = size or end - begin  # 0: to the end
        yield kind, begin + head, begin + max(size, head)
        begin += max(size, head)


def _begins_like_an_image(path: Path) -> bool:
    try:
        if not path.is_file():  # a pipe would wait forever
            return False
        with path.open("rb") as file:
            head = file.read(16)
    except OSError:
        return False
    return (
        head.startswith(MAGIC)
        or head[:4] + head[8:12] == b"RIFFWEBP"
        or (head[4:8] == b"ftyp" and head[8:12] in BRANDS)
    )


def _jpeg(data: bytes) -> tuple[bool, bool]:
    """Returns whether bytes begin like a JPEG, and whether they have its end; those below do so for other formats."""
    return data.startswith(b"\xff\xd8\xff"), data.endswith(b"\xff\xd9")


def _webp(data: bytes) -> tuple[bool, bool]:
    begins = data[:4] + data[8:12] == b"RIFFWEBP"
    return begins or b"RIFF".startswith(data[:4]), begins and len(data) >= 8 + int.from_bytes(data[4:8], "little")


def _avif(data: bytes) -> tuple[bool, bool]:
    ends = [end for _, _, end in boxes(data)]
    return data[4:8] == b"ftyp" or len(data) < 8, ends[-1:] == [len(data)] and len(ends) > 1


def _tiff(data: bytes) -> tuple[bool, bool]:
    from io import BytesIO

    from PIL import Image

    begins = data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") or len(data) < 4
    try:
        with Image.open(BytesIO(data), formats=["TIFF"]) as image:
            tags = image.tag_v2
            starts, counts = tags.get(273) or tags[324], tags.get(279) or tags[325]
            ends = [start + count for start, count in zip(starts, counts, strict=True)]
            return begins, max(*ends, *(tags.get(tag, 0) + 2 for tag in (34665, 34853)), 0) <= len(data)
    except Exception:  # Pillow raises nearly any for a file that is cut off
        return begins, False
