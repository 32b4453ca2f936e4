"""Metadata of a file that are true of a restored picture, too; the rest is left out, or edited."""

import math
import struct
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

from PIL import ExifTags, Image, ImageCms

from dit4sr_pl.images.formats import boxes

ORIENTATION, IPTC_RESOURCE = ExifTags.Base.Orientation, 0x0404
# Tags of a TIFF that describe how its pixels are stored, or hold metadata that is carried otherwise.
STRUCTURE = {*range(254, 260), 262, 263, 266, 273, 277, 278, 279, 280, 281, 284, *range(288, 294), 297, 301, 317}
STRUCTURE |= {318, 319, 320, *range(322, 328), 330, 332, 334, 336, 338, 339, 340, 341, 347, *range(512, 533)}
STRUCTURE |= {700, 32997, 32998, 33723, 34377, 34675, 37724}
# EXIF's details that are measured in the file's own pixels or bytes.
OF_THE_PIXELS = {0x9101, 0x9102, 0x9214, 0xA20E, 0xA20F, 0xA210, 0xA214}
COLOR_CHUNKS = (b"cICP", b"gAMA", b"cHRM", b"sRGB", b"mDCV", b"cLLI")  # chunks of a PNG that say how its colours look
HDR = {16: "PQ", 18: "HLG"}  # transfer functions of ITU-T H.273
GAIN_MAPS = (b"ns.adobe.com/hdr-gain-map", b"aux:hdrgainmap", b"ts:21496:-1")
SRGB_GAMMA = 45455  # 1/2.2, which encoders write for sRGB

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
# Namespaces of XMP that describe the photo and its rights.
XMP_NAMESPACES = {
    "dc": "http://purl.org/dc/elements/1.1/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "xmpRights": "http://ns.adobe.com/xap/1.0/rights/",
    "photoshop": "http://ns.adobe.com/photoshop/1.0/",
    "Iptc4xmpCore": "http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "plus": "http://ns.useplus.org/ldf/xmp/1.0/",
    "cc": "http://creativecommons.org/ns#",
    "lr": "http://ns.adobe.com/lightroom/1.0/",
    "aux": "http://ns.adobe.com/exif/1.0/aux/",
    "exif": "http://ns.adobe.com/exif/1.0/",
    "exifEX": "http://cipa.jp/exif/1.0/",
    "tiff": "http://ns.adobe.com/tiff/1.0/",
}
# Their properties that describe the file, or are measured in its pixels.
XMP_OF_THE_FILE = {"Thumbnails", "ICCProfile", "ColorMode", "LegacyIPTCDigest", "DocumentAncestors", "History"}
XMP_OF_THE_FILE |= {"ImageRegion", "ImageWidth", "ImageLength", "BitsPerSample", "Compression", "Orientation"}
XMP_OF_THE_FILE |= {"PhotometricInterpretation", "SamplesPerPixel", "PlanarConfiguration", "YCbCrSubSampling"}
XMP_OF_THE_FILE |= {"YCbCrPositioning", "TransferFunction", "WhitePoint", "PrimaryChromaticities", "NativeDigest"}
XMP_OF_THE_FILE |= {"YCbCrCoefficients", "ReferenceBlackWhite", "PixelXDimension", "PixelYDimension", "ColorSpace"}
XMP_OF_THE_FILE |= {"ComponentsConfiguration", "CompressedBitsPerPixel", "SubjectArea", "SubjectLocation"}
XMP_OF_THE_FILE |= {"FocalPlaneXResolution", "FocalPlaneYResolution", "FocalPlaneResolutionUnit"}
for prefix, address in (XMP_NAMESPACES | {"rdf": RDF, "x": "adobe:ns:meta/"}).items():
    ElementTree.register_namespace(prefix, address)


def profile_of(icc: bytes | None, notes: list[str]) -> ImageCms.ImageCmsProfile | None:
    """Returns the parsed colour profile, if any; one that cannot be read is noted and left out."""
    try:
        return None if icc is None else ImageCms.ImageCmsProfile(BytesIO(icc))
    except OSError:
        notes.append("its colour profile cannot be read and is left out")
        return None


def carried_exif(exif: Image.Exif, notes: list[str]) -> bytes | None:
    """Returns EXIF data for an upright picture, without the thumbnail, which shows the LR image."""
    try:
        for tag in STRUCTURE & exif.keys():
            del exif[tag]
        if not exif:
            return None
        details = exif.get_ifd(ExifTags.IFD.Exif)
        for tag in OF_THE_PIXELS & details.keys():
            del details[tag]
        exif[ORIENTATION] = 1
        return exif.tobytes()
    except Exception as error:  # Pillow raises many kinds for malformed data
        notes.append(f"its EXIF data cannot be kept ({error})")
        return None


def resized_exif(data: bytes, size: tuple[int, int]) -> Image.Exif:
    """Returns EXIF data with the sizes that they hold, if any, set to height and width."""
    exif = Image.Exif()
    exif.load(data)
    details = exif.get_ifd(ExifTags.IFD.Exif)
    for tag, length in zip((ExifTags.Base.ExifImageHeight, ExifTags.Base.ExifImageWidth), size, strict=True):
        if tag in details:
            details[tag] = length
    return exif


def carried_xmp(xmp: bytes | str | None, notes: list[str]) -> bytes | None:
    """Returns the properties of an XMP packet that describe the photo; None: there are none."""
    if not xmp:
        return None
    try:
        packet = xmp.encode() if isinstance(xmp, str) else bytes(xmp)
        root = ElementTree.fromstring(packet.strip(b"\0 \t\r\n"))
        for description in [each for rdf in root.iter(f"{{{RDF}}}RDF") for each in rdf]:
            for name in [name for name in description.attrib if not _describes_the_photo(name)]:
                del description.attrib[name]
            for child in [child for child in description if not _describes_the_photo(child.tag)]:
                description.remove(child)
        left = [each for rdf in root.iter(f"{{{RDF}}}RDF") for each in rdf if len(each) or len(each.attrib) > 1]
        if not left:
            return None
        head = '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        return f'{head}{ElementTree.tostring(root, encoding="unicode")}<?xpacket end="w"?>'.encode()
    except Exception as error:  # malformed, too deep, or in another encoding
        notes.append(f"its XMP data cannot be kept ({error})")
        return None


def iptc_of(image: Image.Image) -> bytes | None:
    """Returns the IPTC records of an opened JPEG, TIFF or PNG; None: there are none."""
    iptc = None
    if image.format in ("JPEG", "MPO"):
        iptc = (image.info.get("photoshop") or {}).get(IPTC_RESOURCE)
    elif image.format == "TIFF":
        iptc = image.tag_v2._tagdata.get(33723)  # as bytes: some programs call them numbers
    elif image.format == "PNG":
        with suppress(ValueError):
            lines = str(image.text.get("Raw profile type iptc", "")).split("\n")
            iptc = bytes.fromhex("".join(lines[3:]))
    return bytes(iptc) if isinstance(iptc, bytes) and iptc.startswith(b"\x1c") else None


def text_of(image: Image.Image) -> dict[str, str]:
    """Returns a PNG's text and a JPEG's or GIF's comment by keyword, without what describes a thumbnail's file."""
    text = {}
    if image.format == "PNG":
        others = ("Thumb::", "Raw profile type ", "XML:com.adobe.xmp")
        text = {str(key): str(value) for key, value in image.text.items() if not key.startswith(others)}
    elif comment := image.info.get("comment"):
        comment = comment if isinstance(comment, bytes) else str(comment).encode()
        try:
            text = {"Comment": comment.decode()}
        except UnicodeDecodeError:
            text = {"Comment": comment.decode("latin-1")}
    return {key: value.replace("\0", "") for key, value in text.items() if 1 <= len(key) <= 79}


def dpi_of(image: Image.Image, turned: bool) -> tuple[float, float] | None:
    """Returns pixels per inch, horizontal and vertical, of the upright picture; None: the file does not say them."""
    try:
        across, down = (float(number) for number in image.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    known = all(math.isfinite(number) and 0 < number < 100_000 for number in (across, down))
    return ((down, across) if turned else (across, down)) if known else None


def color_chunks(path: Path | str) -> tuple[tuple[bytes, bytes], ...]:
    """Returns names and contents of a PNG's chunks that say how its colours look, except an sRGB's usual gamma."""
    found, at = {}, 8
    with Path(path).open("rb") as file:
        while True:
            file.seek(at)
            head = file.read(8)
            if len(head) < 8 or head[4:] == b"IDAT":
                break
            length, name = struct.unpack(">I4s", head)
            if name in COLOR_CHUNKS and length <= 64:
                found[name] = file.read(length)
            at += 12 + length
    usual = found.get(b"gAMA") == struct.pack(">I", SRGB_GAMMA)
    if b"sRGB" in found or (usual and b"cHRM" not in found):
        found = {name: content for name, content in found.items() if name not in (b"gAMA", b"cHRM")}
    return tuple(found.items())


def hdr_of(chunks: tuple[tuple[bytes, bytes], ...]) -> str | None:
    """Returns the name of the HDR transfer function in a PNG's chunks; None: its colours are no HDR."""
    content = dict(chunks).get(b"cICP", b"")
    return HDR.get(content[1]) if len(content) == 4 else None


def check_transfer(path: Path | str) -> None:
    """Checks an AVIF or HEIC file's transfer function.

    Raises:
        ValueError: its colours are HDR. Pillow reads 8 of its bits, and does not say so.
    """
    data = Path(path).read_bytes()
    transfers = []
    for place in _inside(data, (b"meta", b"iprp", b"ipco"), 0, len(data)):
        for kind, begin, end in boxes(data, *place):
            if kind == b"colr" and end - begin >= 8:
                nclx = data[begin : begin + 4] == b"nclx"
                transfers.append(int.from_bytes(data[begin + 6 : begin + 8]) if nclx else 0)
    if transfers and all(transfer in HDR for transfer in transfers):  # a gain map has another one than its picture
        name = HDR[transfers[0]]
        raise ValueError(
            f"HDR in {name}, of which 8 bits would be read; save it in SDR, or as PNG of 16 bits with cICP"
        )


def has_gain_map(path: Path | str) -> bool:
    """Returns whether a JPEG, HEIC or AVIF file holds an HDR gain map, which a result has not."""
    data = Path(path).read_bytes()
    return any(mark in data for mark in GAIN_MAPS)


def _describes_the_photo(name: str) -> bool:
    address, _, local = name.removeprefix("{").rpartition("}")
    if address == RDF:
        return True
    return address in XMP_NAMESPACES.values() and local not in XMP_OF_THE_FILE


def _inside(data: bytes, kinds: tuple[bytes, ...], begin: int, end: int) -> list[tuple[int, int]]:
    """Returns where the contents of nested boxes begin and end."""
    if not kinds:
        return [(begin, end)]
    found = []
    for kind, start, stop in boxes(data, begin, min(end, len(data))):
        if kind == kinds[0]:
            version = 4 if kind == b"meta" else 0
            found += _inside(data, kinds[1:], start + version, stop)
    return found
