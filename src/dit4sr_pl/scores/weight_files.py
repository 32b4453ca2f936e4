"""Weight files of metrics: which a metric needs, whether they exist, and how to download them. No PyTorch at import."""

import functools
import hashlib
import shutil
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

from dit4sr_pl.common.files import LOCK, atomic_write, exclusive_lock

MODES = ("stop", "skip")
PICKLE = b"\x80\x02"  # first bytes of PyTorch's former format
TIMEOUT = 30  # seconds without a byte from the server


@dataclass(frozen=True)
class Weights:
    """The weight files of one metric. All metrics share one flat folder.

    Args:
        folder: folder of the files.
        on_missing: `"stop"`: a missing file is an error; `"skip"`: the metric is left out.
        files: each with its `url`, whose last part is the file's name, and the first digits of its `sha256`, or None.

    Raises:
        ValueError: `on_missing` is another word.
    """

    folder: str
    on_missing: str
    files: Sequence[Mapping[str, str | None]]

    def __post_init__(self) -> None:
        if self.on_missing not in MODES:
            raise ValueError(f"metric_weights.on_missing={self.on_missing}; choose one of {', '.join(MODES)}")

    def path(self, url: str) -> Path:
        """Returns where the file of a URL lies or should lie."""
        return Path(self.folder).expanduser() / unquote(Path(urlparse(url).path).name)

    def missing(self) -> list[str]:
        """Returns the URLs of the files that do not exist."""
        return [file["url"] for file in self.files if not self.path(file["url"]).is_file()]

    def check(self, metric: str) -> bool:
        """Returns whether all files exist.

        Raises:
            FileNotFoundError: a file is missing and `on_missing` is `"stop"`.
            ValueError: a file has other contents.
        """
        if missing := self.missing():
            if self.on_missing == "skip":
                return False
            raise FileNotFoundError(
                f"{self.path(missing[0])}: no such file, and metrics={metric} needs it; run python -m "
                f"dit4sr_pl.prepare stage=metrics metrics=[{metric}] where there is internet, or give "
                "metric_weights.on_missing=skip"
            )
        for file in self.files:
            check_digest(self.path(file["url"]), file["sha256"])
        return True


def check_metrics(metrics: Mapping[str, Mapping], side: int | None = None) -> None:
    """Checks the weights and image sizes of metrics before anything heavy is done.

    Args:
        metrics: configs by name.
        side: smallest side of the images, pixels; None: unknown.

    Raises:
        FileNotFoundError: see `Weights.check`.
        ValueError: see `Weights.check`, or a metric needs larger images.
    """
    for name, metric in metrics.items():
        weights = Weights(**metric["weights"]) if "weights" in metric else None
        left_out = weights is not None and weights.on_missing == "skip" and weights.missing()
        if not left_out and side is not None and side < metric.get("smallest_side", 1):
            raise ValueError(
                f"metrics={name} needs images of {metric['smallest_side']} pixels a side, not {side}; "
                "leave it out, or take larger images"
            )
        if weights is not None:
            weights.check(name)


def is_of_set(metric: Mapping) -> bool:
    """Returns whether a metric's config or options are of a score of a whole set of images, such as FID."""
    return str(metric["_target_"]).endswith("SetScore")


def refuse_set_scores(metrics: Mapping[str, Mapping]) -> None:
    """Raises ValueError if a metric scores whole sets; validations of a training score images."""
    if names := [name for name, metric in metrics.items() if is_of_set(metric)]:
        raise ValueError(
            f"metrics={','.join(names)}: a score of a whole set, which evaluate measures; leave it out of a training"
        )


def check_digest(path: Path, sha256: str | None) -> None:
    """Raises ValueError unless a file's SHA-256 begins with `sha256`."""
    stat = path.stat()
    if sha256 and not digest(path, stat.st_size, stat.st_mtime_ns).startswith(sha256):
        raise ValueError(f"{path}: truncated or another file (its SHA-256 is not {sha256}...); delete and get it again")


def check_download(path: Path, sha256: str | None) -> None:
    """Raises ValueError unless a file has its SHA-256 or, where none is published, a format of PyTorch's: an archive,
    whose checksums are compared, or a pickle.
    """
    if sha256:
        return check_digest(path, sha256)
    try:
        with zipfile.ZipFile(path) as archive:
            whole = archive.testzip() is None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, EOFError, ValueError):
        with path.open("rb") as file:
            whole = file.read(2) == PICKLE
    if not whole:
        raise ValueError(f"{path}: truncated or no file of weights; delete and get it again")


@functools.cache
def digest(path: Path, size: int, changed: int) -> str:
    """Returns a file's SHA-256, computed once per process for its size and time of change."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, path: Path, sha256: str | None) -> bool:
    """Downloads a file, which appears as `path` when it is complete, and waits for a process that does so already.

    Returns:
        Whether this process downloaded it.

    Raises:
        OSError: there is no connection, or the server refuses.
        ValueError: the download was cut off, or the contents do not match `sha256`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(path.with_name(f".{path.name}{LOCK}"), wait=True):
        if path.is_file():
            check_download(path, sha256)
            return False
        get(url, path, sha256)
        return True


def get(url: str, path: Path, sha256: str | None) -> None:
    """Downloads a file into a new name; errors are those of `download`."""
    with atomic_write(path) as partial:
        # Unlike torch.hub's download this has a timeout and notices a cut, also where no hash is published.
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, partial.open("wb") as file:
            shutil.copyfileobj(answer, file)
        size, expected = partial.stat().st_size, answer.headers["Content-Length"]
        if expected is not None and size != int(expected):
            raise ValueError(f"cut off after {size} of {expected} bytes; run it again")
        try:
            check_download(partial, sha256)
        except ValueError:
            raise ValueError("the server sent another file, such as a login page") from None
