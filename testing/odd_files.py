"""Malformed and odd image files, drawn from a seed, each with the result that restoring must give."""

import os
import random
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import imagecodecs
import numpy as np
import tifffile
from PIL import Image
from PIL.PngImagePlugin import putchunk

SIGNATURE = b"\x89PNG\r\n\x1a\n"


class Odd(NamedTuple):
    """A malformed or odd file.

    Args:
        kind: name of its kind.
        suffix: suffix of its name.
        content: its bytes, or a function that makes it at a path.
        refused: whether it must be refused; None: it may be refused or restored.
        original: an image file whose pixels the result must show, if there is a result; None: any pixels.
    """

    kind: str
    suffix: str
    content: bytes | Callable[[Path], None]
    refused: bool | None
    original: bytes | None = None


def odd_files(count: int, seed: int = 0) -> list[Odd]:
    """Returns `count` files, the kinds in turn."""
    draws = random.Random(seed)
    return [KINDS[i % len(KINDS)](draws) for i in range(count)]


def photo(draws: random.Random, format: str, **options) -> bytes:
    """Returns a smooth image file of a random size, in a random mode that the format has."""
    modes = {"PNG": ("L", "LA", "RGB", "RGBA", "P"), "JPEG": ("L", "RGB", "CMYK"), "TIFF": ("L", "RGB", "RGBA", "CMYK")}
    mode = draws.choice(modes.get(format, ("RGB",)))
    small = np.random.default_rng(draws.getrandbits(32)).integers(0, 256, (4, 4, 4), dtype=np.uint8)
    size = (draws.randint(20, 60), draws.randint(20, 60))
    image = Image.fromarray(small, "RGBA").resize(size, Image.Resampling.BICUBIC)
    file = BytesIO()
    image.convert("RGB").convert(mode).save(file, format, **options)
    return file.getvalue()


def png(*chunks: tuple[bytes, bytes], width: int = 4, height: int = 4) -> bytes:
    """Returns a PNG file of these chunks after the header; width and height are what the header says."""
    file = BytesIO()
    file.write(SIGNATURE)
    putchunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    for name, content in chunks:
        putchunk(file, name, content)
    return file.getvalue()


ROWS = zlib.compress(bytes(4 * 13))
END = (b"IEND", b"")
PACKED = zlib.compress(bytes(50_000_000))  # 49 kB


def truncated(format: str, **options) -> Callable[[random.Random], Odd]:
    """Makes files that are cut at a random byte. A result, if any, must show the whole image."""

    def make(draws: random.Random) -> Odd:
        whole = photo(draws, format, **options)
        cut = whole[: draws.randrange(1, len(whole))]
        return Odd(f"truncated {format}", SUFFIX[format], cut, None, whole)

    return make


def flipped(format: str) -> Callable[[random.Random], Odd]:
    """Makes files with one changed bit. PNG's checksums reveal it; other formats may show another picture."""

    def make(draws: random.Random) -> Odd:
        whole = photo(draws, format)
        content = bytearray(whole)
        content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
        original = whole if format == "PNG" else None
        return Odd(f"flipped bit in {format}", SUFFIX[format], bytes(content), None, original)

    return make


def deep(draws: random.Random) -> Odd:
    """Makes a file of 16 bits per channel, cut or with one byte changed."""
    levels = np.random.default_rng(draws.getrandbits(32)).integers(0, 65536, (20, 30, 3), dtype=np.uint16)
    if draws.random() < 0.5:
        suffix, whole = ".png", imagecodecs.png_encode(levels)
    else:
        suffix, file = ".tif", BytesIO()
        tifffile.imwrite(file, levels, photometric="rgb", compression=draws.choice((None, "lzw", "zlib")))
        whole = file.getvalue()
    at = draws.randrange(1, len(whole))
    if draws.random() < 0.5:
        return Odd("truncated 16 bits", suffix, whole[:at], None, whole)
    changed = whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]
    return Odd("changed 16 bits", suffix, changed, None, whole if suffix == ".png" else None)


def noise(draws: random.Random) -> Odd:
    """Makes random bytes after the signature of an image format."""
    head = draws.choice(
        [SIGNATURE, b"\xff\xd8\xff\xe0", b"II*\0\x08\0\0\0", b"RIFF\xff\0\0\0WEBPVP8 ", b"GIF89a", b"BM"]
    )
    return Odd("noise", draws.choice((".png", ".jpg", ".tif")), head + draws.randbytes(draws.randrange(2000)), True)


def wrong_suffix(draws: random.Random) -> Odd:
    """Makes a whole image whose suffix may be that of another format."""
    format = draws.choice(("PNG", "JPEG", "TIFF", "WEBP", "BMP"))
    whole = photo(draws, format, **({"lossless": True} if format == "WEBP" else {}))
    return Odd("wrong suffix", draws.choice((".jpg", ".png", ".tif")), whole, False, whole)


def text(draws: random.Random) -> Odd:
    """Makes a file that is no image."""
    return Odd(
        "text", ".jpg", draws.choice((b"", b"\0" * 5000, b"not an image\n" * 40, b"%!PS-Adobe\n showpage\n")), True
    )


def bomb(draws: random.Random) -> Odd:
    """Makes a small file whose header says 30,000 x 30,000 pixels."""
    if draws.random() < 0.5:
        return Odd("bomb", ".png", png((b"IDAT", ROWS), END, width=30000, height=30000), True)
    content = bytearray(photo(draws, "BMP"))
    content[18:26] = struct.pack("<ii", 30000, 30000)
    return Odd("bomb", ".bmp", bytes(content), True)


def text_bomb(draws: random.Random) -> Odd:
    """Makes a PNG with 50 MB of compressed metadata."""
    name = draws.choice((b"zTXt", b"iCCP", b"iTXt"))
    head = {b"zTXt": b"x\0\0", b"iCCP": b"x\0\0", b"iTXt": b"x\0\1\0\0\0"}[name]
    return Odd(f"bomb in {name.decode()}", ".png", png((name, head + PACKED), (b"IDAT", ROWS), END), True)


def nan_tiff(draws: random.Random) -> Odd:
    """Makes a TIFF whose pixels are not finite numbers."""

    def make(path: Path) -> None:
        levels = np.full((9, 9), np.nan, draws.choice((np.float16, np.float32, np.float64)))
        tifffile.imwrite(path, levels, photometric="minisblack")

    return Odd("NaN TIFF", ".tif", make, True)


def endless_tiff(draws: random.Random) -> Odd:
    """Makes a TIFF whose directory names itself as the next one."""
    content = bytearray(photo(draws, "TIFF"))
    first = struct.unpack_from("<I", content, 4)[0]
    following = first + 2 + 12 * struct.unpack_from("<H", content, first)[0]
    whole = bytes(content)
    struct.pack_into("<I", content, following, first)
    return Odd("endless TIFF", ".tif", bytes(content), None, whole)


def huge_exif(draws: random.Random) -> Odd:
    """Makes a PNG with megabytes of EXIF data."""
    exif = Image.Exif()
    exif[0x010E] = "x" * draws.randrange(1_000_000, 8_000_000)
    whole = photo(draws, "PNG", exif=exif)
    return Odd("huge EXIF", ".png", whole, False, whole)


def bad_exif(draws: random.Random) -> Odd:
    """Makes a JPEG whose EXIF data are random bytes."""
    whole = photo(draws, "JPEG", exif=b"Exif\0\0" + draws.choice((b"II*\0", b"MM\0*")) + draws.randbytes(200))
    return Odd("bad EXIF", ".jpg", whole, None, None)


def bad_icc(draws: random.Random) -> Odd:
    """Makes an image whose colour profile is random bytes."""
    whole = photo(draws, draws.choice(("PNG", "JPEG")), icc_profile=draws.randbytes(draws.randrange(1, 3000)))
    return Odd("bad ICC", ".png", whole, False, whole)


def thin(draws: random.Random) -> Odd:
    """Makes an image that is one pixel wide or high."""
    length, file = draws.randrange(1, 3000), BytesIO()
    size = draws.choice(((1, length), (length, 1)))
    Image.new(draws.choice(("L", "RGB", "RGBA", "1")), size).save(file, "PNG")
    return Odd("thin", ".png", file.getvalue(), False, file.getvalue())


def wrong_chunks(draws: random.Random) -> Odd:
    """Makes a PNG with missing, repeated or malformed chunks, or with an impossible size."""
    data = (b"IDAT", ROWS)
    chunks = [(END,), (data,), (data, data, END), ((b"PLTE", b"x"), data, END), ((b"IDAT", b"not deflated"), END)]
    chunks += [((b"IDAT", zlib.compress(bytes(5))), END), ((b"tRNS", b""), data, END)]
    sizes = draws.choice(({}, {"width": 0}, {"height": 2**31 - 1}, {"width": 2**31, "height": 2**31}))
    content = png(*draws.choice(chunks), **sizes)
    return Odd("wrong chunks", ".png", content, True if sizes else None)


def folder(draws: random.Random) -> Odd:
    """Makes a folder that is named like an image."""
    return Odd("folder", ".png", Path.mkdir, None)


def link(draws: random.Random) -> Odd:
    """Makes a link to itself, to the folder above or to nothing."""
    targets = draws.choice(("self", "up", "nowhere"))

    def make(path: Path) -> None:
        path.symlink_to({"self": path, "up": path.parent, "nowhere": path.with_suffix(".gone")}[targets])

    return Odd(f"link to {targets}", ".png", make, None if targets == "up" else True)


def pipe(draws: random.Random) -> Odd:
    """Makes a named pipe, which would block a reader."""
    return Odd("pipe", ".png", os.mkfifo, True)


def animation(draws: random.Random) -> Odd:
    """Makes a file of several frames or pages."""
    file = BytesIO()
    frames = [Image.new("RGB", (9, 9), (draws.randrange(256), i, 0)) for i in range(draws.randrange(2, 9))]
    format = draws.choice(("GIF", "PNG", "WEBP", "TIFF"))
    frames[0].save(file, format, save_all=True, append_images=frames[1:])
    return Odd("animation", SUFFIX[format], file.getvalue(), True)


SUFFIX = {"PNG": ".png", "JPEG": ".jpg", "TIFF": ".tif", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}
KINDS = [truncated("PNG"), truncated("JPEG"), truncated("JPEG", progressive=True), truncated("TIFF")]
KINDS += [truncated("TIFF", compression="tiff_lzw"), truncated("TIFF", compression="tiff_adobe_deflate")]
KINDS += [truncated("WEBP", lossless=True), truncated("WEBP"), truncated("GIF"), truncated("BMP")]
KINDS += [flipped(format) for format in ("PNG", "JPEG", "TIFF", "WEBP", "GIF")]
KINDS += [noise, wrong_suffix, text, bomb, text_bomb, nan_tiff, endless_tiff, huge_exif, bad_exif, bad_icc, thin]
KINDS += [wrong_chunks, deep, folder, link, pipe, animation]
