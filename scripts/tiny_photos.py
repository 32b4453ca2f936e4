"""Makes the tiles that tiny-sd3 and tiny-dit4sr are trained on: Debian packages -> 256x256 PNG tiles.

    python scripts/tiny_photos.py --output outputs/tiny/photos

`tiny_photos.txt` next to this file lists the photos: the set (`train` or `held_out`), the Debian package (with its
release where this machine's own release lacks it), the path inside the package. There are photos only, no drawings,
and none of those that scikit-image or scikit-learn ship: these are kept for testing. Each photo is cut at up to three
sizes, the largest of which is the largest at which the photo is sharp. A cut-out is put on a grey ground. One in five
flat tiles is kept, so that the network learns what sky and walls look like.

The script needs `apt-get` and `dpkg-deb`. It installs nothing.
"""

import argparse
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

LIST = Path(__file__).with_suffix(".txt")
TILE = 256
LONG_SIDES = (3072, 2048, 1365, 910, 607)
SHARP = 0.45  # see sharpness(); photos that are enlarged twofold have about 0.2
FLAT, FLAT_KEPT = 0.008, 5  # a tile with less detail is flat, and one in five flat tiles is kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the tiles: train/ and held_out/ in it")
    parser.add_argument("--packages", type=Path, help="folder for the unpacked packages (default: next to the tiles)")
    parser.add_argument("--list", type=Path, default=LIST, help="list of the photos")
    args = parser.parse_args()

    photos = [line.split(" ", 2) for line in args.list.read_text().splitlines()]
    packages = args.packages or args.output.parent / "packages"
    fetch({package for _, package, _ in photos}, packages)
    total = 0
    for number, (photo_set, package, path) in enumerate(photos):
        folder = args.output / photo_set
        folder.mkdir(parents=True, exist_ok=True)
        kept = 0
        for name, tile in tiles(packages / folder_of(package) / path):
            tile.save(folder / f"{number:03d}_{name}.png", compress_level=1)
            kept += 1
        print(f"{kept:4d} tiles  {path}", flush=True)
        total += kept
    print(f"{total} tiles of {TILE}x{TILE} in {args.output}")


def folder_of(package: str) -> str:
    """Returns the folder that a package is unpacked to."""
    return package.replace("/", "_")


def fetch(packages: set[str], folder: Path) -> None:
    """Downloads and unpacks the packages that the folder lacks."""
    missing = sorted(package for package in packages if not (folder / folder_of(package)).exists())
    if not missing:
        return
    folder = folder.resolve()
    releases = {package.split("/")[1] for package in missing if "/" in package}
    options = other_releases(releases, folder / "apt") if releases else []
    for package in missing:
        subprocess.run(["apt-get", *options * ("/" in package), "download", "-q", package], cwd=folder, check=True)
        (archive,) = folder.glob(f"{package.split('/')[0]}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, folder / folder_of(package)], check=True)
        archive.unlink()


def other_releases(releases: set[str], folder: Path) -> list[str]:
    """Prepares package lists of other Debian releases from this machine's mirror, apart from the system's own.

    Returns:
        Options that make `apt-get` use these lists.
    """
    for part in ("lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    targets = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Origin: Debian", "Component: main"]
    mirror = subprocess.run(targets, check=True, capture_output=True, text=True).stdout.splitlines()[0]
    keys = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
    (folder / "sources.list").write_text("".join(f"deb {keys} {mirror} {name} main\n" for name in sorted(releases)))
    options = [f"-oDir::Etc::sourcelist={folder}/sources.list", "-oDir::Etc::sourceparts=-"]
    options += [f"-oDir::State::Lists={folder}/lists", f"-oDir::Cache={folder}/cache"]
    subprocess.run(["apt-get", *options, "update", "-q"], check=True)
    return options


def tiles(path: Path) -> Iterator[tuple[str, Image.Image]]:
    """Yields `(name, 256x256 RGB tile)` for the tiles of a photo at every size."""
    photo = on_grey(ImageOps.exif_transpose(Image.open(path)))
    flat = 0
    for side in sizes(photo):
        small = resized(photo, side)
        for top in cuts(small.height):
            for left in cuts(small.width):
                tile = small.crop((left, top, left + TILE, top + TILE))
                if detail(tile) < FLAT:
                    flat += 1
                    if flat % FLAT_KEPT != 1:
                        continue
                yield f"{side}_{top}_{left}", tile


def sizes(photo: Image.Image) -> list[int]:
    """Returns the long sides to cut a photo at: the largest sharp one, two thirds and a third of it."""
    own = max(photo.size)
    candidates = [side for side in LONG_SIDES if side <= own] or [own]
    sharp = next((side for side in candidates if sharpness(resized(photo, side)) >= SHARP), candidates[-1])
    return [side for side in (sharp, sharp * 2 // 3, sharp // 3) if side == sharp or side >= 1.5 * TILE]


def resized(photo: Image.Image, side: int) -> Image.Image:
    """Returns the photo with a long side of `side` pixels and no side shorter than a tile."""
    scale = side / max(photo.size)
    return photo.resize([max(TILE, round(length * scale)) for length in photo.size], Image.Resampling.LANCZOS)


def sharpness(photo: Image.Image) -> float:
    """Returns what the strongest edges lose when the photo is halved and doubled, relative to their gradient."""
    grey = photo.convert("L")
    halved = grey.resize((grey.width // 2, grey.height // 2), Image.Resampling.LANCZOS)
    loss = np.abs(levels(grey) - levels(halved.resize(grey.size, Image.Resampling.BICUBIC)))[4:-4, 4:-4]
    gradient = np.abs(np.diff(levels(grey), axis=1))
    return float(np.quantile(loss, 0.99) / max(np.quantile(gradient, 0.99), 0.02))


def levels(grey: Image.Image) -> np.ndarray:
    """Returns the pixels of a grey image in 0..1."""
    return np.asarray(grey, dtype=np.float32) / 255


def on_grey(photo: Image.Image) -> Image.Image:
    """Returns an RGB photo; a cut-out is trimmed and put on a grey ground."""
    if "A" not in photo.getbands():
        return photo.convert("RGB")
    cutout = photo.convert("RGBA")
    cutout = cutout.crop(cutout.getchannel("A").getbbox())
    size = tuple(max(TILE, length) for length in cutout.size)
    ground = Image.new("RGB", size, (128, 128, 128))
    ground.paste(cutout, tuple((a - b) // 2 for a, b in zip(size, cutout.size, strict=True)), cutout)
    return ground


def cuts(length: int) -> list[int]:
    """Returns the starts of the fewest tiles that cover `length`, spread evenly."""
    count = -(-length // TILE)
    return [round(i * (length - TILE) / max(count - 1, 1)) for i in range(count)]


def detail(tile: Image.Image) -> float:
    """Returns the mean absolute difference of neighbouring pixels, of 1."""
    grey = levels(tile.convert("L"))
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2


if __name__ == "__main__":
    main()
