"""The file behind a checkpoint's name: a path, an LR stream in this package, or one on the Hugging Face hub."""

import json
import logging
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dit4sr_pl.common.files import atomic_write
from dit4sr_pl.common.hub import COMMIT, LR_STREAM, PROMPTS, HubAddress, HubError, download, locate, look_up
from dit4sr_pl.model.reference_format import WEIGHTS
from dit4sr_pl.model.trained_part import load_release, save_part

log = logging.getLogger(__name__)


def checkpoint_file(checkpoint: str | Path) -> Path:
    """Returns the file of a trained part, or a released folder, from a checkpoint's name.

    Args:
        checkpoint: a path; the name of an LR stream in this package (`tiny-dit4sr`); `dit4sr_q`, `dit4sr_f` or
            `dit4sr_r1`, the authors' releases; or `hub:OWNER/NAME[/SUBFOLDER]`. The last two may end in `@REVISION`.

    Raises:
        FileNotFoundError: it is on the hub, and cannot be read there.
        ValueError: the address is none, or what is there is no LR stream.
        OSError: the download was cut off.
    """
    place = locate(checkpoint)
    return fetch(place) if isinstance(place, HubAddress) else place


def fetch(address: HubAddress) -> Path:
    """Returns the LR-stream file of an address, which is downloaded unless its commit was downloaded before.

    Of a released folder, the LR stream alone is kept, as an LR-stream file; errors are those of `checkpoint_file`.
    """
    from huggingface_hub.utils import WeakFileLock

    if COMMIT.fullmatch(address.revision) and is_whole(kept := kept_file(address, address.revision)):
        return kept  # a commit never changes, so the hub is not asked
    found = look_up(address)
    kept = kept_file(address, found.commit)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(kept.parent / ".lock"):  # other processes wait for the download
        if not is_whole(kept):
            incoming = kept.parent / ".download"
            try:
                take(address, found.commit, found.files, incoming, kept)
            except (HubError, ValueError) as error:
                raise found.out_of_reach or error from None
            shutil.rmtree(incoming, ignore_errors=True)
    if found.out_of_reach and not found.out_of_reach.wanted:
        log.warning("%s; commit %s is used, which was downloaded before", found.out_of_reach, found.commit)
    return kept


def kept_file(address: HubAddress, commit: str) -> Path:
    """Returns where the LR-stream file of a commit is kept."""
    return address.folder / commit / address.subfolder / LR_STREAM


def is_whole(path: Path) -> bool:
    """Returns whether a file exists and has the length that its header says."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def take(address: HubAddress, commit: str, files: list[str], incoming: Path, kept: Path) -> None:
    """Downloads an LR-stream file, or a released folder, into `incoming`, and writes its LR-stream file, and next to it
    the prompt embeddings that come with it, if any do.

    Args:
        address: the place on the hub.
        commit: its commit.
        files: the files of the commit.
        incoming: folder of the download, which a later call resumes.
        kept: the LR-stream file to write.
    """
    top = f"{address.subfolder}/" if address.subfolder else ""
    for name in (PROMPTS, LR_STREAM):  # the LR stream last: with it, all is there
        if top + name in files:
            folder = download(address, commit, [top + name], incoming)
            with atomic_write(kept.with_name(name)) as partial:
                shutil.copyfile(folder / top / name, partial)
    if top + LR_STREAM in files:
        return
    for place in (f"{top}transformer/", top):
        if f"{place}config.json" in files:
            wanted = [f"{place}config.json", *weight_files(address, commit, files, place, incoming)]
            save_part(load_release(download(address, commit, wanted, incoming) / place), kept)
            return
    raise ValueError(f"{address.word}: {hint(files)}")


def weight_files(address: HubAddress, commit: str, files: list[str], place: str, incoming: Path) -> list[str]:
    """Returns the weight files of a diffusers model in a repository, with their index if there are several.

    Raises:
        ValueError: the repository lacks one.
    """
    wanted, index = [place + WEIGHTS], f"{place}{WEIGHTS}.index.json"
    if index in files:
        shards = json.loads((download(address, commit, [index], incoming) / index).read_text())["weight_map"].values()
        wanted = [index, *(place + shard for shard in sorted(set(shards)))]
    if missing := set(wanted).difference(files):
        raise ValueError(
            f"{address.word}: the repository lacks {', '.join(sorted(missing))}; give another one, or another revision"
        )
    return wanted


def hint(files: list[str]) -> str:
    """Returns what to give instead of an address at which there is no LR stream."""
    ends = (f"/{LR_STREAM}", "/transformer/config.json")
    folders = sorted({file.removesuffix(end) for file in files for end in ends if file.endswith(end)})
    where = f"; the repository has some in {', '.join(folders)}: add one as SUBFOLDER" if folders else ""
    return f"neither {LR_STREAM} nor a released transformer/ is there{where}"
