"""Prompt embeddings on disk, the reading half: training needs no text encoder.

A cache is a folder of safetensors files and their index:

    index.json               {"backbone": name, "t5_tokens": n, "encoders": {part: fingerprint},
                              "files": {key: file name}}
    <key>.safetensors        per prompt <key>.embeds (T, D_text) and <key>.pooled (D_pooled), bfloat16;
                             its header holds backbone, t5_tokens, encoders and, by key, the prompts' texts and
                             hashes of their embeddings

A prompt's key is the hash of its text. A file is named by its first key and is complete once it has its name. The
index is made from the headers of the files.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit4sr_pl.common.hashing import values_hash, weights_hash

INDEX = "index.json"
ADVICE = "delete it and run prepare stage=embeddings"
NOTHING: Mapping[str, str] = MappingProxyType({})


class Origin(NamedTuple):
    """The origin of embeddings: a backbone's name, the number of T5 tokens, fingerprints of the encoders."""

    backbone: str
    t5_tokens: int
    encoders: Mapping[str, str] = NOTHING

    def header(self) -> dict:
        """Returns the entries of files and index."""
        encoders = {"encoders": dict(self.encoders)} if self.encoders else {}
        return {"backbone": self.backbone, "t5_tokens": self.t5_tokens} | encoders


class PromptCache:
    """Prompt embeddings that `write_embeddings` wrote, in place of a `PromptEncoder`; files are memory-mapped.

    Args:
        folder: folder of the cache.
        backbone: name of the run's backbone; the cache must have been made with the same.
        t5_tokens: number of the run's T5 tokens; the cache must have been made with the same.
        dtype: dtype of the returned tensors.
        encoders: fingerprints of the backbone's text encoders and tokenizers that are on this machine, by part.

    Attributes:
        encoders: fingerprints of those that the cache was made with; none in one of before 0.2.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: the cache was made with another backbone or number of T5 tokens.
    """

    def __init__(
        self,
        folder: str | Path,
        backbone: str,
        t5_tokens: int,
        dtype: torch.dtype,
        encoders: Mapping[str, str] = NOTHING,
    ):
        self.folder, self.dtype = Path(folder), dtype
        path = self.folder / INDEX
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; run prepare stage=embeddings embeddings={folder}")
        self.files, self.encoders = read_index(path, Origin(backbone, t5_tokens, encoders))
        self.opened: dict[str, tuple[safe_open, dict]] = {}
        self.checked: set[str] = set()  # keys whose embeddings have the hash in their file's header

    def __call__(self, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns prompt embeddings `(B, T, D_text)` and pooled ones `(B, D_pooled)`.

        With SD3's tokenizers T is `77 + t5_tokens`.

        Raises:
            ValueError: a prompt is not in the cache, or a file is truncated.
        """
        embeds, pooled = zip(*map(self.read, prompts), strict=True)
        return torch.stack(embeds).to(device, self.dtype), torch.stack(pooled).to(device, self.dtype)

    def check(self, prompts: Iterable[str]) -> str | None:
        """Opens every file of these prompts, which must be in the cache.

        Returns:
            The hash of their embeddings, by the hashes in the files; None: a file of before 0.2 has none.

        Raises:
            ValueError: a file is missing, truncated or of another kind.
        """
        keys = sorted(prompt_key(prompt) for prompt in prompts)
        headers = {name: open_file(self.folder / name)[1] for name in {self.files[key] for key in keys}}
        hashes = {key: headers[self.files[key]].get("hashes", {}).get(key) for key in keys}
        return None if None in hashes.values() else values_hash(hashes)

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Returns the prompts that the cache does not hold, sorted."""
        return sorted(prompt for prompt in prompts if prompt_key(prompt) not in self.files)

    def read(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Returns the embeddings `(T, D_text)` and `(D_pooled)` of one prompt."""
        key = prompt_key(prompt)
        if key not in self.files:
            raise ValueError(
                f"{self.folder}: holds no embeddings of the prompt {prompt!r}; run prepare stage=embeddings"
            )
        path = self.folder / self.files[key]
        file, header = self.open(path)
        try:
            check_same_text(self.folder, header["prompts"][key], prompt)
            read = file.get_tensor(f"{key}.embeds"), file.get_tensor(f"{key}.pooled")
        except (SafetensorError, KeyError) as error:
            raise damaged(path, error) from None
        if key not in self.checked and header.get("hashes", {}).get(key) not in (None, embeddings_hash(*read)):
            raise damaged(path, "the hash of its embeddings is another")
        self.checked.add(key)
        return read

    def open(self, path: Path) -> tuple[safe_open, dict]:
        """Returns a file of the cache, mapped once, and its header."""
        if path.name not in self.opened:
            self.opened[path.name] = open_file(path)
        return self.opened[path.name]


def read_index(path: Path, origin: Origin) -> tuple[dict[str, str], dict[str, str]]:
    """Returns an index' file names by key, and the fingerprints of the encoders that made the embeddings.

    Raises:
        ValueError: it is no index, or of another backbone.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        header = {key: index[key] for key in ("backbone", "t5_tokens")} | {"encoders": dict(index.get("encoders", {}))}
        files = {str(key): checked_name(name) for key, name in index["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not an index of embeddings ({error}); run prepare stage=embeddings") from None
    check_origin(path, header, origin)
    return files, header["encoders"]


def checked_name(name: object) -> str:
    """Returns the name of a file of the cache; raises ValueError for anything else, such as a path elsewhere."""
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise ValueError(f"{name!r} is no file of the cache")
    return name


def embeddings_hash(embeds: Tensor, pooled: Tensor) -> str:
    """Returns the hash of one prompt's embeddings."""
    return weights_hash({"embeds": embeds, "pooled": pooled})


def open_file(path: Path, advice: str = ADVICE) -> tuple[safe_open, dict]:
    """Returns a mapped file and its header.

    Args:
        path: the file.
        advice: what to do if it is damaged.

    Raises:
        OSError: the file cannot be read, which does not mean that it is damaged.
        ValueError: it is missing, or no file of embeddings.
    """
    if not path.is_file():
        raise damaged(path, "no such file", advice)
    path.open("rb").close()  # safetensors' own errors do not tell why
    try:
        file = safe_open(path, "pt")
        header = json.loads((file.metadata() or {})["embeddings"])
        entries = header, header["prompts"], header.get("hashes", {}), header.get("encoders", {})
        if not all(isinstance(entry, dict) for entry in entries) or not {"backbone", "t5_tokens"} <= header.keys():
            raise ValueError("its header is another")
        return file, header
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, error, advice) from None


def damaged(path: Path, reason: object, advice: str = ADVICE) -> ValueError:
    """Returns the error of a file that cannot be used."""
    reason = f"{path}: missing, truncated, damaged or no file of embeddings ({reason})"
    return ValueError(f"{reason}; {advice}")


def check_origin(path: Path, header: dict, origin: Origin) -> None:
    """Raises ValueError unless a header names this origin; parts without a fingerprint are not compared."""
    theirs = {"model.backbone.name": header["backbone"], "model.backbone.t5_tokens": header["t5_tokens"]}
    ours = {"model.backbone.name": origin.backbone, "model.backbone.t5_tokens": origin.t5_tokens}
    for name in ours:
        if theirs[name] != ours[name]:
            raise ValueError(
                f"{path}: embeddings made with {name}={theirs[name]}; this run has {ours[name]}. Set it to the same, "
                "or prepare embeddings for it in another folder"
            )
    now = origin.encoders
    if changed := [part for part, made in header.get("encoders", {}).items() if now.get(part, made) != made]:
        raise ValueError(
            f"{path}: embeddings made with another {' and '.join(changed)} than {origin.backbone} has now; bring the "
            "former one back, or prepare embeddings in another folder"
        )


def check_same_text(folder: Path, stored: str, prompt: str) -> None:
    """Raises ValueError if two prompts have one key."""
    if stored != prompt:
        raise ValueError(f"{folder}: {stored!r} and {prompt!r} have the same key; change one of them by a word")


def prompt_key(prompt: str) -> str:
    """Returns the key of a prompt: the hash of its text."""
    return hashlib.blake2b(prompt.encode(), digest_size=16).hexdigest()
