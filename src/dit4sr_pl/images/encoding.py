"""Files of results in other formats than PNG: JPEG, WebP, TIFF and AVIF, with as much metadata as each can hold."""

import struct
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from dit4sr_pl.images.metadata import IPTC_RESOURCE, resized_exif
from dit4sr_pl.images.picture import Picture

QUALITY = 95
LONGEST_SEGMENT = 65_000  # bytes of a JPEG's EXIF data, XMP packet, IPTC records or comment
SUB_DIRECTORIES = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
XMP_TAG, IPTC_TAG, LONG = 700, 33723, 4
LARGEST_TIFF = 2**32 - 2**25  # bytes of pixels; larger files are BigTIFF, whose addresses have 64 bits


def encode(levels: np.ndarray, picture: Picture, format: str, quality: int | None, notes: list[str]) -> bytes:
    """Returns a file's bytes.

    Args:
        levels: uint8 `(H, W, C)`, for TIFF also uint16: grey or RGB, with or without alpha.
        picture: the picture with its metadata.
        format: `jpeg`, `webp`, `tiff` or `avif`.
        quality: 1 to 100; None: 95. TIFF is lossless.
        notes: gets a line for each piece of metadata that the format cannot hold.
    """
    held = {"icc": picture.icc, "xmp": picture.xmp, "iptc": picture.iptc, "exif": None}
    if picture.exif is not None:
        held["exif"] = resized_exif(picture.exif, levels.shape[:2])
    comment = dict(picture.text).get("Comment", "").encode() if format == "jpeg" else b""
    lost = {"colour chunks (gAMA, cHRM, cICP)": any(name != b"sRGB" for name, _ in picture.chunks)}
    lost["text"] = any(format != "jpeg" or key != "Comment" for key, _ in picture.text)
    lost["IPTC records"] = format in ("webp", "avif") and picture.iptc is not None
    notes += [f"its {what}: {format} has no place for them" for what, there in lost.items() if there]
    if format == "tiff":
        return _tiff(levels, held, picture.dpi, notes)
    if format == "jpeg":
        sizes = {"xmp": len(held["xmp"] or b""), "iptc": len(held["iptc"] or b"")}
        sizes["exif"] = len(held["exif"].tobytes()) if held["exif"] is not None else 0
        for kind in [kind for kind, size in sizes.items() if size > LONGEST_SEGMENT]:
            notes.append(f"its {kind.upper()} data are longer than a JPEG holds and are left out")
            held[kind] = None
    options = {"icc_profile": held["icc"], "exif": held["exif"], "xmp": held["xmp"]}
    options = {key: value for key, value in options.items() if value is not None}
    options["quality"] = quality or QUALITY
    if format == "jpeg":
        options |= {"subsampling": 0, "extra": _photoshop(held["iptc"]), "comment": comment[:LONGEST_SEGMENT]}
        options |= {} if picture.dpi is None else {"dpi": tuple(round(number) for number in picture.dpi)}
    if format == "avif":
        options |= {"subsampling": "4:4:4"}
    file = BytesIO()
    Image.fromarray(levels.squeeze(2) if levels.shape[2] == 1 else levels).save(file, format.upper(), **options)
    return file.getvalue()


def _photoshop(iptc: bytes | None) -> bytes:
    """Returns a JPEG's segment with IPTC records."""
    if iptc is None:
        return b""
    resource = b"8BIM" + struct.pack(">HHI", IPTC_RESOURCE, 0, len(iptc)) + iptc + bytes(len(iptc) % 2)
    content = b"Photoshop 3.0\0" + resource
    return b"\xff\xed" + struct.pack(">H", len(content) + 2) + content


def _tiff(levels: np.ndarray, held: dict, dpi: tuple[float, float] | None, notes: list[str]) -> bytes:
    """Returns a TIFF that is compressed without loss; EXIF's details and places are directories at its end."""
    import tifffile

    tags, exif = [], held["exif"] or {}
    for tag, value in exif.items():
        if isinstance(value, str) and tag != 306:  # tifffile has an argument for the date
            tags.append((tag, "s", 0, value.encode("ascii", "replace").decode(), True))
    packets = (XMP_TAG, held["xmp"]), (IPTC_TAG, held["iptc"])
    tags += [(tag, "B", len(packet), packet, True) for tag, packet in packets if packet]
    directories = {int(tag): exif.get_ifd(tag) for tag in SUB_DIRECTORIES if tag in exif}
    if levels.dtype == np.uint16 and levels.shape[2] == 2:
        levels = levels[..., [0, 0, 0, 1]]  # Pillow reads no grey TIFF of 16 bits with alpha
    large = levels.nbytes > LARGEST_TIFF
    if large and directories:
        notes.append("its EXIF details: a TIFF of over 4 GiB has no place for them")
    channels = levels.shape[2]
    file = BytesIO()
    tifffile.imwrite(
        file,
        levels.squeeze(2) if channels == 1 else levels,
        byteorder="<",
        bigtiff=large,
        photometric="rgb" if channels > 2 else "minisblack",
        planarconfig="contig" if channels > 1 else None,
        extrasamples=["unassalpha"] if channels in (2, 4) else None,
        compression="zlib",
        predictor=True,
        metadata=None,
        software=False,
        datetime=exif.get(306),
        resolution=dpi,
        resolutionunit="inch" if dpi else None,
        iccprofile=held["icc"],
        extratags=tags,
    )
    return _with_directories(file.getvalue(), directories) if directories and not large else file.getvalue()


def _with_directories(tiff: bytes, directories: dict[int, dict]) -> bytes:
    """Returns a TIFF with further directories, which its first one names; tifffile writes none.

    Args:
        tiff: a file of little-endian numbers, of less than 4 GiB.
        directories: by the tag that names each, its values by tag.
    """
    data = bytearray(tiff)
    first = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, first)[0]
    entries = [bytes(data[first + 2 + 12 * i : first + 14 + 12 * i]) for i in range(count)]
    for tag, values in directories.items():
        directory = ImageFileDirectory_v2()
        for key, value in values.items():
            if not isinstance(value, dict):  # a directory within the directory
                directory[key] = value
        data += bytes(len(data) % 2)  # directories begin at even bytes
        entries.append(struct.pack("<HHII", tag, LONG, 1, len(data)))
        data += directory.tobytes(len(data))
    data += bytes(len(data) % 2)
    struct.pack_into("<I", data, 4, len(data))
    entries.sort(key=lambda entry: struct.unpack_from("<H", entry))
    return bytes(data) + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
