"""Images of two folders that belong together by name, such as LR images and their ground truth."""

import re
from pathlib import Path

from dit4sr_pl.common.names import check_name, folded
from dit4sr_pl.images.files import find_images, image_size


def by_name(folder: Path, suffix: str = "") -> dict[str, Path]:
    """Returns a folder's images by name, in the order of their paths.

    A name is the path below the folder without file type and without the ending `suffix`, which may stand before a
    number too: `Canon_21_x4_5.png` is `Canon_21_5` with the suffix `_x4`. Images without the suffix are skipped.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: two files have one name without regard to case, a name cannot be used, or none ends in `suffix`.
    """
    found: dict[str, list[tuple[str, Path]]] = {}
    for path in find_images(folder):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if match := re.fullmatch(rf"(.*){re.escape(suffix)}(_\d+)?", stem, re.DOTALL):
            name = check_name(match[1] + (match[2] or ""), folder)
            found.setdefault(folded(name), []).append((name, path))
    twice = [" and ".join(path.name for _, path in files) for files in found.values() if len(files) > 1]
    if twice:
        raise ValueError(f"{folder}: one name, several files: {'; '.join(twice)}; keep one of each")
    if not found:
        raise ValueError(f"{folder}: no image there has a name that ends in {suffix}; give another suffix, or null")
    return {name: path for ((name, path),) in found.values()}


def check_pairs(first: dict[str, Path], second: dict[str, Path]) -> None:
    """Raises ValueError, which lists all files that have no partner of their name on the other side."""
    alone = [str(first[name]) for name in first if name not in second]
    alone += [str(second[name]) for name in second if name not in first]
    if alone:
        raise ValueError(f"no file of the same name on the other side for {', '.join(alone)}; add or remove files")


def check_sizes(small: dict[str, Path], large: dict[str, Path], scale: int) -> None:
    """Raises ValueError, which lists all pairs in which the second image is not `scale` times as large as the first."""
    wrong = []
    for name, path in small.items():
        (width, height), (wide, high) = image_size(path), image_size(large[name])
        if (scale * width, scale * height) != (wide, high):
            wrong.append(f"{large[name]} ({wide}x{high}, {path} {width}x{height})")
    if wrong:
        wanted = "as large" if scale == 1 else f"{scale} times as large"
        raise ValueError(
            f"not {wanted} as the file of the same name: {', '.join(wrong)}; give files that belong together"
        )
