"""Which code a run ran: the commit, what differed from it, and the versions of all packages."""

import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

from omegaconf import OmegaConf

from dit4sr_pl.common.files import atomic_write

LARGEST_DIFF = 1_000_000  # bytes; of larger ones only the hash is kept


def record_code(folder: Path) -> None:
    """Writes `code.yaml` and, if files of the checkout differ from its commit, `code.diff`."""
    diff = git("diff", "HEAD") if (commit := commit_of_this_package()) else ""
    others = git("ls-files", "--others", "--exclude-standard", "--full-name", ":/") if commit else ""
    code = {
        "git": commit or "no git",
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
        "untracked": others.splitlines(),
        "python": platform.python_version(),
        "packages": {d.name: d.version for d in sorted(importlib.metadata.distributions(), key=lambda d: d.name)},
    }
    with atomic_write(folder / "code.yaml") as partial:
        OmegaConf.save(code, partial)
    if diff and len(diff) <= LARGEST_DIFF:
        with atomic_write(folder / "code.diff") as partial:
            partial.write_text(diff)
    else:
        (folder / "code.diff").unlink(missing_ok=True)


def commit_of_this_package() -> str | None:
    """None where git is not installed, or does not track these files (an installed wheel)."""
    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD").strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def git(*arguments: str) -> str:
    command = ["git", *arguments]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=True)
    return result.stdout.decode(errors="replace")
