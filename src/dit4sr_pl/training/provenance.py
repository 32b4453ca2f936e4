"""A record of the code of a run: its commit, the uncommitted changes, and the versions of all packages."""

import functools
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

from omegaconf import OmegaConf

from dit4sr_pl.common.files import atomic_write

LARGEST_DIFF = 1_000_000  # bytes; a larger diff is recorded by its hash alone


def record_code(folder: Path) -> None:
    """Writes `code.yaml` and, if files of the checkout differ from its commit, `code.diff`."""
    diff = git("diff", "HEAD") if (commit := commit_of_this_package()) else ""
    others = git("ls-files", "--others", "--exclude-standard", "--full-name", ":/") if commit else ""
    code = {
        "git": commit or "no git",
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
        "untracked": others.splitlines(),
        "python": platform.python_version(),
        "packages": package_versions(),
    }
    with atomic_write(folder / "code.yaml") as partial:
        OmegaConf.save(code, partial)
    if diff and len(diff) <= LARGEST_DIFF:
        with atomic_write(folder / "code.diff") as partial:
            partial.write_text(diff)
    else:
        (folder / "code.diff").unlink(missing_ok=True)


@functools.cache
def package_versions() -> dict[str, str]:
    """Returns the versions of all installed packages by name; a process reads them once, since that takes a second."""
    metadata = [package.metadata for package in importlib.metadata.distributions()]
    return dict(sorted((each["Name"], each["Version"]) for each in metadata))


def commit_of_this_package() -> str | None:
    """Returns the checkout's commit; None: git is not installed, or the files are not in a checkout (a wheel)."""
    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD").strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def git(*arguments: str) -> str:
    """Returns the output of a git command that runs in this package's folder."""
    command = ["git", *arguments]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=True)
    return result.stdout.decode(errors="replace")
