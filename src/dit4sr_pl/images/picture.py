"""A picture: the pixels of a file with alpha, bit depth and metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dit4sr_pl.images.metadata import hdr_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Picture:
    """The upright pixels of a file and what of its metadata is true of a result.

    Args:
        color: `(1, H, W)` grey or `(3, H, W)` RGB in 0..1, float32, in the colour space of `icc` or `chunks`.
        alpha: `(1, H, W)` in 0..1; None: opaque.
        bits: bits per channel, 8 or 16.
        icc: the file's colour profile; None: sRGB.
        exif: the file's EXIF data without thumbnail, its orientation set to upright.
        notes: what could not be kept, a line each.
        xmp: the file's XMP packet without what describes the file.
        iptc: the file's IPTC records.
        dpi: pixels per inch, horizontal and vertical.
        text: a PNG's text by keyword; a JPEG's comment as `Comment`.
        chunks: names and contents of a PNG's chunks that say how its colours look.
    """

    color: Tensor
    alpha: Tensor | None = None
    bits: int = 8
    icc: bytes | None = None
    exif: bytes | None = None
    notes: tuple[str, ...] = ()
    xmp: bytes | None = None
    iptc: bytes | None = None
    dpi: tuple[float, float] | None = None
    text: tuple[tuple[str, str], ...] = ()
    chunks: tuple[tuple[bytes, bytes], ...] = ()


def check_colors(picture: Picture, format: str) -> None:
    """Raises ValueError for a picture in HDR whose result is to be no PNG, since other files would not say so."""
    if format != "png" and (hdr := hdr_of(picture.chunks)):
        raise ValueError(f"HDR in {hdr}, which is kept in a PNG alone; give format=png")
