"""The photos that tiny-sd3 and tiny-dit4sr are trained on: Debian packages -> 256x256 PNG tiles.

    python scripts/tiny_photos.py --output outputs/tiny/photos

`tiny_photos.txt` beside this file lists them (package, path inside it): photos only, no drawings, and none
of those that scikit-image or scikit-learn ship, which are kept for testing. Each photo is cut at up to three
sizes, because wallpapers are soft at full size; cut-outs come onto a grey ground; flat tiles are left out.
Needs `apt-get` and `dpkg-deb`; nothing is installed.
"""

import argparse
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

LIST = Path(__file__).with_suffix(".txt")
TILE = 256
LONG_SIDES = (2048, 1280, 768)
FLAT = 0.008  # mean absolute difference of neighbouring pixels, of 1; under it a tile is sky or blur


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the tiles")
    parser.add_argument("--packages", type=Path, help="folder for the unpacked packages (default: beside the tiles)")
    args = parser.parse_args()

    photos = [line.split(" ", 1) for line in LIST.read_text().splitlines()]
    packages = args.packages or args.output.parent / "packages"
    for package in sorted({package for package, _ in photos}):
        if not (packages / package).exists():
            unpack(package, packages)

    args.output.mkdir(parents=True, exist_ok=True)
    total = 0
    for number, (package, path) in enumerate(photos):
        kept = 0
        for name, tile in tiles(packages / package / path):
            tile.save(args.output / f"{number:03d}_{name}.png")
            kept += 1
        print(f"{kept:4d} tiles  {path}", flush=True)
        total += kept
    print(f"{total} tiles of {TILE}x{TILE} in {args.output}")


def unpack(package: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True)
    (archive,) = folder.glob(f"{package}_*.deb")
    subprocess.run(["dpkg-deb", "-x", archive, folder / package], check=True)


def tiles(path: Path):
    """Yields `(name, 256x256 RGB tile)` for every tile with something in it, at every size."""
    photo = on_grey(ImageOps.exif_transpose(Image.open(path)))
    sizes = [side for side in LONG_SIDES if side < max(photo.size)] or [max(photo.size)]
    for side in sizes:
        scale = side / max(photo.size)
        width, height = (max(TILE, round(length * scale)) for length in photo.size)
        small = photo.resize((width, height), Image.Resampling.LANCZOS)
        for top in cuts(height):
            for left in cuts(width):
                tile = small.crop((left, top, left + TILE, top + TILE))
                if detail(tile) >= FLAT:
                    yield f"{side}_{top}_{left}", tile


def on_grey(photo: Image.Image) -> Image.Image:
    if "A" not in photo.getbands():
        return photo.convert("RGB")
    cutout = photo.convert("RGBA")
    cutout = cutout.crop(cutout.getchannel("A").getbbox())
    size = tuple(max(TILE, length) for length in cutout.size)
    ground = Image.new("RGB", size, (128, 128, 128))
    ground.paste(cutout, tuple((a - b) // 2 for a, b in zip(size, cutout.size, strict=True)), cutout)
    return ground


def cuts(length: int) -> list[int]:
    """Starts of the fewest tiles that cover `length`, spread evenly."""
    count = -(-length // TILE)
    return [round(i * (length - TILE) / max(count - 1, 1)) for i in range(count)]


def detail(tile: Image.Image) -> float:
    grey = np.asarray(tile.convert("L"), dtype=np.float32) / 255
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2


if __name__ == "__main__":
    main()
