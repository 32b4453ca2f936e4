"""Names of images: paths below a folder, from which other files are named. All that read or make them check them here.

A name comes from a folder's listing or from somebody's table, and results, captions and rows of scores are kept by it.
"""

import unicodedata
from collections.abc import Iterable

LONGEST = 255  # bytes of a file's name on Linux, macOS and Windows


def check_name(name: object, source: object) -> str:
    """Returns a name that stays below any folder it is joined to, and can be written everywhere.

    Args:
        name: the path, with `/`.
        source: the file or folder that it comes from, for the message.

    Raises:
        ValueError: it is absolute, leads upward, is not UTF-8, or a part of it is too long.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"{source}: {name!r} is not the name of a file; give a text")
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in name:
        raise ValueError(f"{source}: {name!r} does not stay within its folder; give paths below it, without `..`")
    try:
        sizes = [len(part.encode()) for part in parts]
    except UnicodeEncodeError:
        raise ValueError(f"{source}: {name!r} is not UTF-8; rename the file") from None
    if max(sizes) > LONGEST:
        raise ValueError(f"{source}: {name!r} is longer than {LONGEST} bytes; rename the file")
    return name


def check_names(names: Iterable[object], source: object) -> list[str]:
    """Returns names that are each safe, see `check_name`, and no two of which are one file on some file system.

    macOS and Windows do not tell `A.png` from `a.png`, nor an accented letter from a letter and its accent.

    Raises:
        ValueError: see `check_name`, or two names are one; the message has both.
    """
    checked, first = [check_name(name, source) for name in names], {}
    for name in checked:
        if (key := folded(name)) in first:
            raise ValueError(f"{source}: {first[key]!r} and {name!r} are one name; rename one of the files")
        first[key] = name
    return checked


def folded(name: str) -> str:
    """Returns a name without differences of letter case and of composition."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
