"""The pictures to restore: files, the names of their results, their prompts. Needs no PyTorch."""

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dit4sr_pl.common.names import LONGEST, folded
from dit4sr_pl.images.captions import CaptionFiles, drop_sentences
from dit4sr_pl.images.formats import check_sides, check_suffix, find_pictures, is_complete, result_format
from dit4sr_pl.images.picture_files import read_header
from dit4sr_pl.restoration.sizes import TargetSize, result_size


@dataclass(frozen=True)
class Entry:
    """A picture to restore.

    Args:
        source: its file.
        target: its result's file.
        name: the file's path below the input folder without suffix; noise and caption file depend on it.
        size: height and width from the file's header.
        alpha: whether the file has alpha.
        prompt: its caption, may be empty.
        sample: number of the sample; its noise is that of the seed plus this number.
        caption_file: file of a caption that a model writes, which all samples share.
        format: format of its result.
    """

    source: Path
    target: Path
    name: str
    size: tuple[int, int]
    alpha: bool
    prompt: str = ""
    sample: int = 0
    caption_file: Path | None = None
    format: str = "png"


@dataclass
class Worklist:
    """Pictures to restore, the results that are there already with their captions of today, a message for each picture
    that cannot be restored, and the files of the folder that are no pictures.
    """

    entries: list[Entry] = field(default_factory=list)
    results: dict[Path, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Number of the results that are there already."""
        return len(self.results)

    @property
    def total(self) -> int:
        """Number of all pictures."""
        return len(self.entries) + self.done + len(self.failures)


def make_worklist(
    source: Path,
    output: Path,
    prompt: str = "",
    overwrite: bool = False,
    keep_suffix: bool = False,
    first_frame: bool = False,
    shard: tuple[int, int] = (1, 1),
    dropped_words: Iterable[str] = (),
    samples: int = 1,
    format: str = "png",
    scale: float | TargetSize = 4,
) -> Worklist:
    """Checks every file's name and header, so that most failures show before a model is read.

    Args:
        source: a picture, or a folder whose pictures are all meant except those in `output`.
        output: folder of the results.
        prompt: prompt of all pictures; empty: a picture `a/b.jpg` takes the text of `a/b.txt`, if there is one.
        overwrite: whether existing results are restored again.
        keep_suffix: whether the result of `b.jpg` is named `b.jpg.png` instead of `b.png`.
        first_frame: whether files with several frames or pages, which are refused otherwise, restore the first.
        shard: this task's number, from 1, and the number of tasks; each has every n-th picture.
        dropped_words: sentences of the text files that contain one of the words are left out.
        samples: results per picture; with more than one, sample k is in the folder `samplekk` of `output`.
        format: format of the results, see `result_format`.
        scale: factor of the sides, or the size of the results; see `result_size`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds no picture.
    """
    root, files, others = _find(source, output)
    texts, worklist = CaptionFiles(root), Worklist(others=others)
    folders = [output] if samples == 1 else [output / f"sample{sample:02}" for sample in range(samples)]
    formats = {file: result_format(file, format) for file in files}
    results = {file: _target(file.relative_to(root), keep_suffix, formats[file][1], format) for file in files}
    wanted = Counter(folded(str(result)) for result in results.values())
    inputs, (number, count) = {os.path.realpath(file) for file in files}, shard
    for sample, (file, result) in itertools.product(range(samples), [*results.items()][number - 1 :: count]):
        name, target, form = (
            file.relative_to(root).with_suffix("").as_posix(),
            folders[sample] / result,
            formats[file][0],
        )
        try:
            if (sharing := wanted[folded(str(result))]) > 1:
                raise ValueError(f"{file}: {sharing} files share the result {target}; give keep_suffix=true")
            if len(os.fsencode(target.name)) > LONGEST:
                raise ValueError(f"{file}: the name of its result is longer than {LONGEST} bytes; rename it")
            if os.path.realpath(target) in inputs:
                raise ValueError(f"{file}: its result {target} would replace an input; choose another output")
            check_suffix(file)
            caption = prompt or drop_sentences(texts[name], dropped_words)
            if not overwrite and is_complete(target, form):
                worklist.results[target] = caption
                continue
            header = read_header(file, first_frame)
            check_sides(file, result_size(header.size, scale), form)
            # Results of `a.png` and `a.jpg` may lie next to each other in their own formats.
            described = file.name if keep_suffix or format == "same" else file.stem
            text = (folders[0] / result).with_name(f"{described}.txt")
            worklist.entries.append(Entry(file, target, name, *header, caption, sample, text, form))
        except (ValueError, OSError) as error:
            message = str(error)
            worklist.failures.append(message if message.startswith(str(file)) else f"{file}: {message}")
    return worklist


def batches(entries: Sequence[Entry], batch_size: int) -> Iterator[list[Entry]]:
    """Yields up to `batch_size` entries of one size and sample number, in the order of their first picture."""
    by_size = {}
    for entry in entries:
        by_size.setdefault((entry.size, entry.sample), []).append(entry)
    for same in by_size.values():
        yield from (same[first : first + batch_size] for first in range(0, len(same), batch_size))


def _find(source: Path, output: Path) -> tuple[Path, list[Path], list[Path]]:
    """Returns the folder that names are relative to, the pictures, and the files that are none, except captions."""
    if not source.is_dir():
        return source.parent, [source], []
    results = Path(os.path.realpath(output))
    in_results = results.is_relative_to(os.path.realpath(source))  # files in the output folder are results
    files, others = (
        [path for path in paths if not (in_results and Path(os.path.realpath(path.parent)).is_relative_to(results))]
        for paths in find_pictures(source)
    )
    if not files:
        where = ", except in the output folder" * in_results
        raise ValueError(f"{source}: no images in this folder or below it{where}; give another folder")
    described = {file.with_suffix(".txt") for file in files}
    return source, files, [path for path in others if path not in described]


def _target(file: Path, keep_suffix: bool, suffix: str, format: str) -> Path:
    if format == "same" and suffix == file.suffix:
        return file
    return file.with_name(f"{file.name if keep_suffix else file.stem}{suffix}")
