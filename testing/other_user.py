"""Files as another user sees them, for tests that run as root."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534


class SomebodyElse:
    """A folder that every user may enter, and a block in which this process is another user.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Makes this process another user while the context is open."""
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)


@contextmanager
def another_user() -> Iterator[SomebodyElse]:
    """Yields a new folder of root's; it is removed in the end."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield SomebodyElse(Path(folder))
