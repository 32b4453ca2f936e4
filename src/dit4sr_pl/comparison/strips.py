"""The same crops of every run side by side, drawn with Pillow alone."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dit4sr_pl.common.files import atomic_write
from dit4sr_pl.comparison.dataset_table import DatasetTable
from dit4sr_pl.comparison.rows import Run
from dit4sr_pl.images.files import IMAGE_SUFFIXES, open_rgb

GAP, TEXT = 4, 13  # pixels
Corner = tuple[int, int]


def pictures_of(run: Run, name: str) -> Path:
    """Returns the file of an image; if there is none, the name that `evaluate` would give it."""
    paths = [run.pictures / f"{name}{suffix}" for suffix in IMAGE_SUFFIXES]
    return next(filter(Path.is_file, paths), paths[0])


def open_all(runs: Sequence[Run], name: str) -> list[Image.Image]:
    """Returns every run's picture; raises ValueError if one has another size than the first run's."""
    pictures = [open_rgb(pictures_of(run, name)) for run in runs]
    for run, picture in zip(runs, pictures, strict=True):
        if picture.size != pictures[0].size:
            sizes = " but ".join("{}x{}".format(*each.size) for each in (picture, pictures[0]))
            raise ValueError(
                f"{pictures_of(run, name)}: {sizes} in {pictures_of(runs[0], name)}; "
                "no strip without pictures of one size, give strip.images=[NAMES] of others"
            )
    return pictures


def most_different(pictures: Sequence[Image.Image], crop: int) -> tuple[float, Corner]:
    """Returns the variance over pictures of the crop where they differ most (mean over its grey pixels), and its
    corner.
    """
    grey = np.stack([np.asarray(picture.convert("L"), dtype=np.float32) for picture in pictures])
    variance = grey.var(axis=0)
    height, width = (min(crop, length) for length in variance.shape)
    sums = np.pad(variance.cumsum(axis=0, dtype=np.float64).cumsum(axis=1), ((1, 0), (1, 0)))
    boxes = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    y, x = np.unravel_index(boxes.argmax(), boxes.shape)
    return boxes[y, x] / (height * width), (int(x), int(y))


def common_pictures(runs: Sequence[Run]) -> list[str]:
    """Returns the names of images whose picture every run has, in the first run's order."""
    return [name for name in runs[0].result.scores if all(pictures_of(run, name).is_file() for run in runs)]


def choose(runs: Sequence[Run], names: Sequence[str], count: int, crop: int, at: Corner | None) -> dict[str, Corner]:
    """Returns `count` images and the upper left corners of their crops: as given, or where the runs differ most."""
    with ThreadPoolExecutor(4) as pool:  # Pillow decodes without Python's lock
        found = pool.map(lambda name: most_different(open_all(runs, name), crop), names)
        differing = dict(zip(names, found, strict=True))
    most = sorted(names, key=lambda name: -differing[name][0])[:count]
    return {name: tuple(at) if at else differing[name][1] for name in names if name in most}


def beside(folder: str | None, name: str, size: Corner) -> list[Image.Image]:
    """Returns the picture of that name in a folder, its pixels enlarged to the size of the runs' pictures; [] without
    folder.
    """
    if folder is None:
        return []
    return [open_rgb(Path(folder) / f"{name}.png").resize(size, Image.Resampling.NEAREST)]


def comparison_strip(
    runs: Sequence[Run], labels: Sequence[str], chosen: dict[str, Corner], crop: int, lr: str | None, hr: str | None
):
    """Returns a page with a row per image and a column per run, between LR and ground truth if their folders are
    given.
    """
    labels = ["LR"] * (lr is not None) + list(labels) + ["ground truth"] * (hr is not None)
    font = ImageFont.load_default(TEXT)
    width = max(crop, *(int(font.getlength(label)) for label in labels)) + GAP
    height = crop + TEXT + 2 * GAP
    page = Image.new("RGB", (width * len(labels) + GAP, height * len(chosen) + TEXT + 2 * GAP), "white")
    draw = ImageDraw.Draw(page)
    for column, label in enumerate(labels):
        draw.text((GAP + column * width, GAP), label, "black", font)
    for row, (name, corner) in enumerate(chosen.items()):
        top = TEXT + 2 * GAP + row * height
        pictures = open_all(runs, name)
        size = pictures[0].size
        for column, picture in enumerate(beside(lr, name, size) + pictures + beside(hr, name, size)):
            page.paste(cut(picture, corner, crop), (GAP + column * width, top))
        draw.text((GAP, top + crop), "{} at {}, {}".format(name, *corner), "black", font)
    return page


def cut(picture: Image.Image, corner: Corner, crop: int) -> Image.Image:
    """Returns the crop of a picture; raises ValueError for a corner outside of it."""
    (x, y), (width, height) = corner, picture.size
    if x >= width or y >= height:
        raise ValueError(
            f"strip.at={list(corner)}: outside of a picture of {width}x{height}; give a corner within it, or null"
        )
    return picture.crop((x, y, min(x + crop, width), min(y + crop, height)))


def write_strip(
    table: DatasetTable,
    path: Path,
    images: int | Sequence[str],
    crop: int,
    at: Corner | None = None,
    lr: str | None = None,
    hr: str | None = None,
) -> Iterator[str]:
    """Writes the strip of a table, with the first seed of every row that has pictures; yields what is missing, and why.

    Args:
        table: the table.
        path: the PNG file.
        images: number of images, or their names.
        crop: side of the crops, pixels.
        at: upper left corner of the crops; None: where the runs differ most.
        lr: folder of LR images; None: no LR column.
        hr: folder of ground truth; None: no such column.

    Raises:
        ValueError: pictures have different sizes or are damaged.
    """
    first = {
        label: next((run for run in row.runs if run.pictures), None)
        for label, row in zip(table.labels, table.rows, strict=True)
    }
    if without := [label for label, run in first.items() if run is None]:
        yield f"{table.dataset}: no pictures, so not in the strip: {', '.join(without)}."
    runs = {label: run for label, run in first.items() if run is not None}
    common = common_pictures(list(runs.values())) if runs else []
    wanted = common if isinstance(images, int) else list(map(str, images))  # YAML reads some names as numbers
    names = [name for name in wanted if name in common]
    if missing := [name for name in wanted if name not in common]:
        yield f"{table.dataset}: not in the strip, since not every run has their picture: {', '.join(missing)}."
    if not names:
        yield f"{table.dataset}: no strip, since no image has a picture in every run."
        return
    chosen = choose(list(runs.values()), names, images if isinstance(images, int) else len(names), crop, at)
    page = comparison_strip(list(runs.values()), list(runs), chosen, crop, lr, hr)
    with atomic_write(path) as partial:
        page.save(partial, format="PNG")
