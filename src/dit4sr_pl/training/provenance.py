"""A record of the code of a run: its commit, the uncommitted changes, and the versions of all packages."""

import functools
import hashlib
import importlib.metadata
import logging
import os
import platform
import re
import subprocess
from contextlib import suppress
from pathlib import Path

import yaml

from dit4sr_pl.common.files import atomic_write

log = logging.getLogger(__name__)

LARGEST_DIFF = 1_000_000  # bytes; a larger diff is recorded by its hash alone


def record_code(folder: Path, step: int = 0) -> None:
    """Writes `code.yaml` and, if files of the checkout differ from its commit, `code.diff`.

    A run that resumes from `step` writes `code-NNNNNNN.yaml`, so that the record of its former steps stays. What cannot
    be found out is a warning: it does not stop a run.
    """
    name = f"code-{step:07d}" if step else "code"
    try:
        write_code(folder, name)
    except Exception as error:  # broken installations of other packages raise errors of any kind
        log.warning("%s: the code of this run is not recorded (%s: %s)", folder, type(error).__name__, error)


def write_code(folder: Path, name: str) -> None:
    """Writes the record as files of this name; see `record_code`."""
    diff = git("diff", "HEAD") if (commit := commit_of_this_package()) else ""
    others = git("ls-files", "--others", "--exclude-standard", "--full-name", ":/") if commit else ""
    code = {
        "git": commit or "no git",
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
        "untracked": others.splitlines(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "job": scheduler_job(),
    }
    with atomic_write(folder / f"{name}.yaml") as partial:
        partial.write_text(yaml.safe_dump(code, sort_keys=False, allow_unicode=True), encoding="utf-8")
    if diff and len(diff) <= LARGEST_DIFF:
        with atomic_write(folder / f"{name}.diff") as partial:
            partial.write_text(diff, encoding="utf-8")
    else:
        (folder / f"{name}.diff").unlink(missing_ok=True)


def scheduler_job() -> str | None:
    """Returns the SLURM job that this process belongs to, in the form JOB or ARRAY_TASK; None: no job."""
    array = [os.environ.get(name) for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")]
    return "_".join(array) if all(array) else os.environ.get("SLURM_JOB_ID")


def recorded_job(folder: Path) -> str | None:
    """Returns the SLURM job that trained in a folder last; None: no job, or no record."""
    records = [path for path in folder.glob("code*.yaml") if re.fullmatch(r"code(-\d{7,})?\.yaml", path.name)]
    for path in sorted(records, key=lambda path: path.stat().st_mtime)[-1:]:
        with suppress(OSError, yaml.YAMLError, UnicodeDecodeError):
            record = yaml.safe_load(path.read_text(encoding="utf-8"))
            return record.get("job") if isinstance(record, dict) else None
    return None


@functools.cache
def package_versions() -> dict[str, str]:
    """Returns the versions of all installed packages by name; a process reads them once, since that takes a second."""
    metadata = [package.metadata for package in importlib.metadata.distributions()]
    # A killed pip leaves folders without a name.
    return dict(sorted((str(each["Name"]), str(each["Version"])) for each in metadata if each["Name"]))


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
