"""Large images band by band: what is done so holds no second image."""

from collections.abc import Iterator

ROWS = 256


def bands(height: int) -> Iterator[slice]:
    """The rows of an image from top to bottom, `ROWS` at a time."""
    for top in range(0, height, ROWS):
        yield slice(top, min(top + ROWS, height))
