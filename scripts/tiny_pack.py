"""Packs what a GPU machine without network needs for the training of the small pair, and prints the sizes.

    python scripts/tiny_pack.py --photos outputs/tiny/photos --output outputs/tiny/pack --limit 64 \\
        --without src/dit4sr_pl/assets/tiny-sd3/transformer src/dit4sr_pl/assets/tiny-dit4sr \\
        src/dit4sr_pl/assets/tiny-student-*

`wheels/` gets the packages that a machine with PyTorch, Lightning and transformers lacks (`WHEELS`), in the versions of
requirements.lock and for Python 3.12. `photos/` gets tiles as AVIF at visually lossless quality, photo by photo in
turn, so that every photo is there. The limit in MiB counts the files that git tracks, too. Weights that are to be made
anew need not travel: name them in `--without`, and remove them from the working tree for that time (`git checkout`
brings them back). Given again, the command keeps the wheels and the tiles that it finds.
"""

import argparse
import re
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

from PIL import Image

from dit4sr_pl.common.files import atomic_write

ROOT = Path(__file__).parents[1]
PYTHON = "3.12"
GLIBC = ("2_28", "2_27", "2_17")
WHEELS = ("diffusers", "importlib_metadata", "kornia", "kornia_rs", "hydra-core", "omegaconf", "hydra-joblib-launcher")
WHEELS += ("pyiqa", "stlpips_pytorch")
FROM_SOURCE = ("antlr4-python3-runtime",)
UNUSED = {  # what is left out of wheels: weights of a second network of ST-LPIPS, and pictures
    "stlpips_pytorch": ("stlpips_pytorch/weights/vST0.0/vgg",),
    "pyiqa": ("docs/", "tests/", "ResultsCalibra/"),
}
QUALITY = 80  # of AVIF with full colour resolution: about 40 dB
HELD_OUT = 0.05  # share of the photos' bytes
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder with train/ and held_out/ (tiny_photos.py)")
    parser.add_argument("--output", type=Path, required=True, help="folder for wheels/ and photos/")
    parser.add_argument("--limit", type=float, default=64, help="MiB, with the files that git tracks")
    parser.add_argument("--without", nargs="*", default=[], help="tracked files and folders that do not travel")
    parser.add_argument("--wheels", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()

    tracked = size_of(tracked_files(args.without))
    if args.wheels and not (args.output / "wheels").exists():
        fetch_wheels(args.output / "wheels")
    wheels = size_of((args.output / "wheels").glob("*"))
    left = args.limit * MIB - tracked - wheels
    if left <= 0:
        raise SystemExit(f"{(tracked + wheels) / MIB:.1f} MiB of tracked files and wheels leave no room for photos")
    held_out = pack_photos(args.photos / "held_out", args.output / "photos" / "held_out", HELD_OUT * left)
    train = pack_photos(args.photos / "train", args.output / "photos" / "train", left - held_out)
    sizes = {"tracked files": tracked, "wheels": wheels, "held-out photos": held_out, "training photos": train}
    for name, size in sizes.items():
        print(f"{size / MIB:6.1f} MiB  {name}")
    print(f"{sum(sizes.values()) / MIB:6.1f} MiB  together, of {args.limit:g}")


def tracked_files(without: list[str]) -> list[Path]:
    """Returns the tracked files of the working tree, except those in `without` or below it."""
    listed = ["git", "ls-files", "-z", "--", ".", *(f":!{path}" for path in without)]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


def size_of(files: Iterable[Path]) -> int:
    """Returns the bytes of files."""
    return sum(file.stat().st_size for file in files)


def fetch_wheels(folder: Path) -> None:
    """Downloads wheels for the other machine's Python, and builds those that exist as source only."""
    folder.mkdir(parents=True)
    locked = dict(re.findall(r"^(.+)==(.+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    wheels, sources = ([f"{name}=={locked[name]}" for name in names] for names in (WHEELS, FROM_SOURCE))
    pip = [sys.executable, "-m", "pip"]
    platforms = [f"--platform=manylinux_{version}_x86_64" for version in GLIBC] + ["--platform=manylinux2014_x86_64"]
    target = ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp", *platforms]
    subprocess.run([*pip, "download", "-q", "--no-deps", *target, "-d", folder, *wheels], check=True)
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", folder, *sources], check=True)
    for name, prefixes in UNUSED.items():
        leave_out(next(folder.glob(f"{name}-*.whl")), prefixes)


def leave_out(wheel: Path, prefixes: tuple[str, ...]) -> None:
    """Writes a wheel again without the files whose names begin with one of the prefixes."""
    with (
        atomic_write(wheel) as partial,
        zipfile.ZipFile(wheel) as whole,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as smaller,
    ):
        for name in (name for name in whole.namelist() if not name.startswith(prefixes)):
            content = whole.read(name)
            if name.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if not line.startswith(prefixes)).encode()
            smaller.writestr(name, content)


def pack_photos(tiles: Path, folder: Path, limit: float) -> int:
    """Writes tiles as AVIF until `limit` bytes are full, the first tile of every photo first; returns the bytes."""
    by_photo = defaultdict(list)
    for path in sorted(tiles.iterdir()):
        by_photo[path.name.split("_")[0]].append(path)
    size, kept = 0, set()
    for path in (path for turn in zip_longest(*map(spread, by_photo.values())) for path in turn if path):
        packed = folder / f"{path.stem}.avif"
        if not packed.exists():
            with atomic_write(packed) as partial:
                Image.open(path).save(partial, "AVIF", quality=QUALITY, subsampling="4:4:4", speed=6)
        if size + packed.stat().st_size > limit:
            break
        size += packed.stat().st_size
        kept.add(packed)
    for packed in set(folder.glob("*.avif")) - kept:
        packed.unlink()
    return size


def spread(items: list[Path]) -> list[Path]:
    """Returns the items in an order whose every beginning is spread over the whole list."""
    return sorted(items, key=lambda item: (items.index(item) * 0.6180339887) % 1)


if __name__ == "__main__":
    main()
