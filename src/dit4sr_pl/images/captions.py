"""Captions of photos by name (path below the photos' folder, without suffix): `.txt` files, or one table per set."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

COLUMNS = ("image", "caption")
LONGEST_TEXT = 65536  # bytes of a caption
TABLES = (".parquet", ".jsonl")


class CaptionFiles:
    """Captions as files: the photo NAME has `folder/NAME.txt`, which is read when it is needed."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)

    def __getitem__(self, name: str) -> str:
        """Returns the caption on one line, empty if there is none.

        Raises:
            ValueError: the file is not UTF-8.
        """
        path = self.folder / f"{name}.txt"
        try:
            return on_one_line(read_text(path))
        except FileNotFoundError:
            return ""
        except UnicodeDecodeError:
            raise ValueError(f"{path}: the caption is not UTF-8 text; convert it or remove it") from None

    def names(self) -> set[str]:
        """Returns the photos that have a caption file, by listing the folders; no file is opened."""
        found = set()
        for parent, _, files in os.walk(self.folder, followlinks=True):
            below = Path(parent).relative_to(self.folder)
            found |= {(below / file[:-4]).as_posix() for file in files if file.endswith(".txt")}
        return found


class CaptionTable:
    """Captions as a parquet or jsonl table with the columns `image` (the photo's name) and `caption`, kept in memory.

    Raises:
        ValueError: the table cannot be read, lacks a column, or has two captions for one photo.
    """

    def __init__(self, path: Path | str):
        self.captions = {}
        for image, caption in _jsonl_rows(path) if Path(path).suffix == ".jsonl" else _parquet_rows(path):
            if image in self.captions:
                raise ValueError(f"{path}: two captions for {image}; keep one")
            self.captions[image] = on_one_line(caption)

    def __getitem__(self, name: str) -> str:
        """Returns the caption on one line, empty if there is none."""
        return self.captions.get(name, "")

    def names(self) -> set[str]:
        """Returns the photos that have a caption; an empty one does not count."""
        return {name for name, caption in self.captions.items() if caption}


def read_text(path: Path) -> str:
    """Reads a short text, without the byte order mark that Notepad begins files with.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file, such as a pipe, which would never end, or too long; or it is not UTF-8.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file; remove it, or give another folder of captions")
    with path.open("rb") as file:
        text = file.read(LONGEST_TEXT + 1)
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"{path}: longer than {LONGEST_TEXT} bytes, which is no caption; shorten or remove it")
    return text.decode("utf-8-sig")


def on_one_line(caption: str) -> str:
    """Returns a caption with one space for every run of white space, as SD3's tokenizers read it."""
    return " ".join(caption.split())


def drop_sentences(caption: str, words: Iterable[str]) -> str:
    """Returns a caption without the sentences that contain one of `words`, also within a word (`blurry`).

    A sentence ends at `.`, `!` or `?`, whatever comes after it, as in the release: within `3.5` and before a quotation
    mark, too.
    """
    words = [word.lower() for word in words]
    sentences = re.split(r"(?<=[.!?])", caption)
    return "".join(each for each in sentences if not any(word in on_one_line(each.lower()) for word in words)).strip()


def open_captions(source: Path | str) -> CaptionFiles | CaptionTable:
    """Opens captions in a folder of `.txt` files or in a table.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is neither a folder nor a table.
    """
    path = Path(source)
    if path.is_dir():
        return CaptionFiles(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder of captions")
    if path.suffix not in TABLES:
        raise ValueError(f"{path}: captions come from a folder of .txt files or a table ({', '.join(TABLES)})")
    return CaptionTable(path)


def _jsonl_rows(path: Path | str) -> Iterator[tuple[str, str]]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; convert it") from None
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
    except (pa.ArrowException, KeyError, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None) is not None:  # pyarrow's own OSErrors, of damaged files, have no number
            raise
        raise ValueError(f"{path}: not a parquet table with the text columns {' and '.join(COLUMNS)}") from None
    return zip(*columns, strict=True)
