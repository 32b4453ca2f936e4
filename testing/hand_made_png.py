"""PNG files written and read by hand."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL.PngImagePlugin import putchunk


def png16(levels: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """Returns a PNG file made by hand, without filters and with one IDAT."""
    channels = levels.shape[2] if levels.ndim == 3 else 1
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = levels.astype(">u2").tobytes()
    length = len(rows) // len(levels)
    lines = b"".join(b"\0" + rows[i : i + length] for i in range(0, len(rows), length))
    file = BytesIO()
    file.write(b"\x89PNG\r\n\x1a\n")
    putchunk(file, b"IHDR", struct.pack(">IIBBBBB", levels.shape[1], len(levels), 16, kind, 0, 0, 0))
    for name, content in (*chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
        putchunk(file, name, content)
    return file.getvalue()


def levels_of_png(path: Path) -> np.ndarray:
    """Returns a PNG's samples, unfiltered by hand."""
    data, at, idat = path.read_bytes(), 8, b""
    while at < len(data):
        length, name = struct.unpack(">I4s", data[at : at + 8])
        content = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(name + content)
        if name == b"IHDR":
            width, height, bits, kind = struct.unpack(">IIBB", content[:10])
        idat += content if name == b"IDAT" else b""
        at += 12 + length
    channels = {0: 1, 4: 2, 2: 3, 6: 4}[kind]
    step = channels * bits // 8
    rows, raw, above = [], zlib.decompress(idat), bytes(width * step)
    for y in range(height):
        line = raw[y * (width * step + 1) : (y + 1) * (width * step + 1)]
        row = bytearray(line[1:])
        for i in range(len(row)):
            left, up = row[i - step] if i >= step else 0, above[i]
            corner = above[i - step] if i >= step else 0
            paeth = min((left, up, corner), key=lambda value, p=left + up - corner: abs(p - value))
            row[i] = (row[i] + (0, left, up, (left + up) // 2, paeth)[line[0]]) % 256
        rows.append(bytes(row))
        above = rows[-1]
    levels = np.frombuffer(b"".join(rows), ">u2" if bits == 16 else "u1").reshape(height, width, channels)
    return levels.squeeze(2) if channels == 1 else levels
