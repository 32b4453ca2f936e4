"""Captions of photos, by name (path below the photos' folder, without suffix): `.txt` files, or one table per set."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

COLUMNS = ("image", "caption")
TABLES = (".parquet", ".jsonl")


class CaptionFiles:
    """One file `folder/NAME.txt` for the photo NAME, read when it is asked for."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)

    def __getitem__(self, name: str) -> str:
        """The caption on one line; empty if there is none. `ValueError` unless the file is UTF-8."""
        path = self.folder / f"{name}.txt"
        try:
            return " ".join(path.read_text(encoding="utf-8").split())
        except FileNotFoundError:
            return ""
        except UnicodeDecodeError:
            raise ValueError(f"{path}: the caption is not UTF-8 text; convert it or remove it") from None

    def names(self) -> set[str]:
        """Photos that have a file: by listing the folders, without a look at any file."""
        found = set()
        for parent, _, files in os.walk(self.folder, followlinks=True):
            below = Path(parent).relative_to(self.folder)
            found |= {(below / file[:-4]).as_posix() for file in files if file.endswith(".txt")}
        return found


class CaptionTable:
    """A parquet or jsonl table with the columns `image` (the photo's name) and `caption`, held in memory.

    Raises `ValueError` for a table that cannot be read, lacks a column, or has two captions for one photo.
    """

    def __init__(self, path: Path | str):
        self.captions = {}
        for image, caption in _jsonl_rows(path) if Path(path).suffix == ".jsonl" else _parquet_rows(path):
            if image in self.captions:
                raise ValueError(f"{path}: two captions for {image}; keep one")
            self.captions[image] = " ".join(caption.split())

    def __getitem__(self, name: str) -> str:
        """The caption on one line; empty if there is none."""
        return self.captions.get(name, "")

    def names(self) -> set[str]:
        """Photos that have a caption, an empty one not counted."""
        return {name for name, caption in self.captions.items() if caption}


def open_captions(source: Path | str) -> CaptionFiles | CaptionTable:
    """Captions in a folder of `.txt` files or in a table; `FileNotFoundError` or `ValueError` if it is neither."""
    path = Path(source)
    if path.is_dir():
        return CaptionFiles(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder of captions")
    if path.suffix not in TABLES:
        raise ValueError(f"{path}: captions come from a folder of .txt files or a table ({', '.join(TABLES)})")
    return CaptionTable(path)


def _jsonl_rows(path: Path | str) -> Iterator[tuple[str, str]]:
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _row(line, f"{path}, line {number}")


def _row(line: str, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
        image, caption = (row[column] for column in COLUMNS)
    except (ValueError, LookupError, TypeError):
        image = caption = None
    if not isinstance(image, str) or not isinstance(caption, str):
        raise ValueError(f'{where}: not of the form {{"image": NAME, "caption": TEXT}}')
    return image, caption


def _parquet_rows(path: Path | str) -> Iterator[tuple[str, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=list(COLUMNS))
        columns = [table[column].cast(pa.string()).fill_null("").to_pylist() for column in COLUMNS]
    except (pa.ArrowException, KeyError):
        raise ValueError(f"{path}: not a parquet table with the text columns {' and '.join(COLUMNS)}") from None
    return zip(*columns, strict=True)
