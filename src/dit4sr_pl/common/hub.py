"""The Hugging Face hub: addresses, look-ups and downloads. Its errors become one line. No PyTorch.

`huggingface_hub` is imported where it is used, since most commands never ask the hub for anything.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dit4sr_pl.common.files import ASSETS, atomic_write

LR_STREAM = "lr_stream.safetensors"
PROMPTS = "prompt_embeddings.safetensors"  # next to it, if it is there: see backbone/shipped_prompts.py
RELEASES = ("dit4sr_q", "dit4sr_f", "dit4sr_r1")  # of the paper's authors, subfolders of RELEASE_REPO
RELEASE_REPO = "acceptee/DiT4SR"
RELEASED_BASE = "stabilityai/stable-diffusion-3.5-medium"  # of all three
COMMIT = re.compile(r"[0-9a-f]{40}")
ADDRESS = re.compile(r"hub:([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)(?:@([\w./-]+))?")
RELEASE = re.compile(rf"({'|'.join(RELEASES)})(?:@([\w./-]+))?")


class HubError(FileNotFoundError):
    """An error of the hub in one line: what is not there or cannot be read, and what to do."""


class OutOfReachError(HubError):
    """The hub does not answer. `wanted` says whether the user asked for that by HF_HUB_OFFLINE."""

    wanted = False


@dataclass(frozen=True)
class HubAddress:
    """A place on the hub.

    Args:
        word: the address as the user wrote it.
        repo: `OWNER/NAME`.
        subfolder: folder in the repository; empty: its top.
        revision: branch, tag or commit.
    """

    word: str
    repo: str
    subfolder: str
    revision: str

    @classmethod
    def parse(cls, word: str | Path) -> HubAddress | None:
        """Returns the address of `dit4sr_q`, `dit4sr_f`, `dit4sr_r1` or `hub:OWNER/NAME[/SUBFOLDER]`, each with an
        optional `@REVISION`; None: the word is none of these.

        Raises:
            ValueError: the word begins with `hub:` and goes on in another way.
        """
        word = str(word)
        if match := RELEASE.fullmatch(word):
            return cls(word, RELEASE_REPO, match[1], match[2] or "main")
        if (match := ADDRESS.fullmatch(word)) and not {".", ".."} & set(word[4:].split("/")):
            return cls(word, match[1], match[2].strip("/"), match[3] or "main")
        if word.startswith("hub:"):
            raise ValueError(f"{word}: not an address; give hub:OWNER/NAME[/SUBFOLDER][@REVISION]")
        return None

    @property
    def folder(self) -> Path:
        """This project's own folder of the repository's files."""
        return cache_folder() / self.repo.replace("/", "--")


def locate(checkpoint: str | Path) -> Path | HubAddress:
    """Returns where a checkpoint is.

    Args:
        checkpoint: a path; the name of an LR stream in this package (`tiny-dit4sr`); or a word of `HubAddress.parse`.
            A file or a released folder on the disk goes before a release of the same name; another folder does not.

    Raises:
        ValueError: see `HubAddress.parse`.
    """
    shipped = ASSETS / str(checkpoint) / LR_STREAM
    if shipped.is_file():
        return shipped
    path = Path(checkpoint)
    there = path.is_file() or any((path / config).is_file() for config in ("config.json", "transformer/config.json"))
    return path if there else HubAddress.parse(checkpoint) or path


def cache_folder() -> Path:
    """Returns the folder of what this project keeps of the hub: below HF_HOME, or next to the hub's own cache."""
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "dit4sr_pl"
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dit4sr_pl" / "hub"


class Found(NamedTuple):
    """The result of a look-up: a commit, the files that can be had, and why the hub was not asked, if it was not."""

    commit: str
    files: list[str]
    out_of_reach: OutOfReachError | None


def look_up(address: HubAddress) -> Found:
    """Returns the commit that an address stands for now, and the repository's files.

    If the hub is out of reach, the commit is that of the last look-up or of the hub's own cache, and the files are
    those of that cache.

    Raises:
        HubError: there is no such repository or revision, it may not be read, or the hub is out of reach and no commit
            is known from before.
    """
    from huggingface_hub import HfApi

    note = address.folder / "refs" / address.revision.replace("/", "--")
    try:
        with hub_errors(address.word, address.repo, address.revision):
            info = HfApi().model_info(address.repo, revision=address.revision)
    except OutOfReachError as error:
        if COMMIT.fullmatch(address.revision):
            commit = address.revision
        elif note.is_file():
            commit = note.read_text().strip()
        else:
            commit = cached_commit(address)
        if commit is None:
            raise
        return Found(commit, cached_files(address.repo, commit), error)
    with atomic_write(note) as partial:
        partial.write_text(info.sha)
    return Found(info.sha, [sibling.rfilename for sibling in info.siblings], None)


def cached_commit(address: HubAddress) -> str | None:
    """Returns the commit of an address in the hub's own cache; None: it is not there."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{address.repo.replace('/', '--')}"
    note = folder / "refs" / address.revision
    return note.read_text().strip() if note.is_file() else None


def cached_files(repo: str, commit: str) -> list[str]:
    """Returns the files of a commit that are in the hub's own cache."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots" / commit
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]


def download(address: HubAddress, commit: str, files: Sequence[str], folder: Path) -> Path:
    """Returns the folder of a commit's files: the hub's own cache if all are there, else `folder`, after downloading.

    Raises:
        FileNotFoundError: a file may not be read, or the hub is out of reach.
        OSError: the download was cut off.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = [try_to_load_from_cache(address.repo, file, revision=commit) for file in files]
    if all(isinstance(path, str) for path in cached):
        return Path(cached[0]).parents[files[0].count("/")]
    for partial in folder.rglob("*.incomplete"):  # a killed process left it, and nothing resumes it
        partial.unlink()
    with hub_errors(address.word, address.repo, address.revision):
        for file in files:
            hf_hub_download(address.repo, file, revision=commit, local_dir=folder)
    return folder


def check_access(name: str, what: str) -> None:
    """Checks that a model of the hub can be read: that it is in the hub's own cache, or that the hub allows it.

    Args:
        name: hub id, `OWNER/NAME`, of a model in diffusers' layout.
        what: the config key that gave it, for the message.

    Raises:
        FileNotFoundError: there is no such model, it may not be read, or the hub is out of reach.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    index, config = "model_index.json", "transformer/config.json"
    if not any(isinstance(try_to_load_from_cache(name, file), str) for file in (index, config)):
        with hub_errors(f"{what}={name}", name):
            hf_hub_download(name, index)


def pipeline_folder(name: str) -> Path | None:
    """Returns the folder of a pipeline's files: a folder of that name, or what the hub's own cache has; None: nothing.

    Args:
        name: a folder in diffusers' layout, or a hub id.
    """
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir() or "/" not in name:
        return Path(name)
    index = try_to_load_from_cache(name, "model_index.json")
    return Path(index).parent if isinstance(index, str) else None


@contextmanager
def hub_errors(what: str, repo: str, revision: str = "main", writes: bool = False) -> Iterator[None]:
    """Turns errors of the hub, also those that another library wrapped, into one line.

    Args:
        what: the beginning of the line.
        repo: the repository.
        revision: the revision that was asked for.
        writes: whether something is uploaded.

    Raises:
        HubError: there is no such repository or revision, it may not be read, or a download was cut off.
        OutOfReachError: the hub does not answer.
    """
    from huggingface_hub import constants

    try:
        yield
    except HubError:
        raise
    except Exception as error:
        chain = list(causes(error))
        if reason := refusal(chain, repo, revision, writes):
            raise HubError(f"{what}: {reason}") from None
        if reason := silence(chain):
            out_of_reach = OutOfReachError(f"{what}: {reason}")
            out_of_reach.wanted = constants.is_offline_mode()
            raise out_of_reach from None
        raise


def refusal(chain: Sequence[BaseException], repo: str, revision: str, writes: bool) -> str:
    """Returns the text for an error that says what is wrong with a request; empty: it is another error."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    steps = f"accept the licence at {page}, and run `hf auth login` or set HF_TOKEN"
    texts = {
        errors.GatedRepoError: f"a gated model; {steps}",
        errors.RevisionNotFoundError: f"{page} has no revision {revision}; give a branch, tag or commit",
        errors.RemoteEntryNotFoundError: f"{page} lacks a file at revision {revision}",
        errors.RepositoryNotFoundError: f"{page} does not exist or is not open to you; check the name; if it is "
        f"private or gated, {steps}",
    }
    for error in chain:
        if writes and status_of(error) in (401, 403, 404) and not isinstance(error, errors.RevisionNotFoundError):
            return f"{page} needs a token that may write there; run `hf auth login` or set HF_TOKEN"
        for kind, text in texts.items():  # a gated model's error is one of the last kind, too
            if isinstance(error, kind):
                return text
        if status_of(error) in (401, 403):
            return f"{page} refuses your token; {steps}"
        if str(error).startswith(("Consistency check failed", "Error while uploading")):
            return "the transfer was cut off; run the same command again"
    return ""


def silence(chain: Sequence[BaseException]) -> str:
    """Returns the text for an error that says that the hub does not answer; empty: it is another error."""
    from huggingface_hub import constants, errors

    for error in chain:
        if isinstance(error, errors.OfflineModeIsEnabled):
            return "not among the downloaded files, and HF_HUB_OFFLINE is set; unset it once"
        if status := status_of(error):
            return f"{constants.ENDPOINT} answers with error {status}; try again later"
    if any(isinstance(error, errors.HTTPError | errors.LocalEntryNotFoundError) for error in chain):
        return f"{constants.ENDPOINT} cannot be reached; try again later"
    return ""


def status_of(error: BaseException) -> int | None:
    """Returns the HTTP status of an error; None: it has none."""
    return getattr(getattr(error, "response", None), "status_code", None)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and those that led to it."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
