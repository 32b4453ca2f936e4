"""Prompt embeddings on disk, the reading half: training needs no text encoder.

A cache is a folder of safetensors files and their index:

    index.json               {"backbone": name, "t5_tokens": n, "files": {key: file name}}
    <key>.safetensors        per prompt <key>.embeds (T, D_text) and <key>.pooled (D_pooled), bfloat16;
                             its header holds backbone, t5_tokens and the prompts' texts by key

A prompt's key is the hash of its text. A file is named by its first key and is complete once it has its name. The
index is made from the headers of the files.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "index.json"


class PromptCache:
    """Prompt embeddings that `write_embeddings` wrote, in place of a `PromptEncoder`; files are memory-mapped.

    Args:
        folder: folder of the cache.
        backbone: name of the run's backbone; the cache must have been made with the same.
        t5_tokens: number of the run's T5 tokens; the cache must have been made with the same.
        dtype: dtype of the returned tensors.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: the cache was made with another backbone or number of T5 tokens.
    """

    def __init__(self, folder: str | Path, backbone: str, t5_tokens: int, dtype: torch.dtype):
        self.folder, self.dtype = Path(folder), dtype
        path = self.folder / INDEX
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; run prepare stage=embeddings embeddings={folder}")
        try:
            index = json.loads(path.read_text())
            check_origin(path, index, backbone, t5_tokens)
            self.files = index["files"]
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{path}: not an index of embeddings ({error}); run prepare stage=embeddings") from None
        self.opened: dict[str, tuple[safe_open, dict[str, str]]] = {}

    def __call__(self, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns prompt embeddings `(B, T, D_text)` and pooled ones `(B, D_pooled)`.

        With SD3's tokenizers T is `77 + t5_tokens`.

        Raises:
            ValueError: a prompt is not in the cache, or a file is truncated.
        """
        embeds, pooled = zip(*map(self.read, prompts), strict=True)
        return torch.stack(embeds).to(device, self.dtype), torch.stack(pooled).to(device, self.dtype)

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
        file, prompts = self.open(self.files[key])
        check_same_text(self.folder, prompts[key], prompt)
        return file.get_tensor(f"{key}.embeds"), file.get_tensor(f"{key}.pooled")

    def open(self, name: str) -> tuple[safe_open, dict[str, str]]:
        """Returns a file of the cache, mapped once, and the texts of its prompts by key."""
        if name not in self.opened:
            file, header = open_file(self.folder / name)
            self.opened[name] = file, header["prompts"]
        return self.opened[name]


def open_file(path: Path) -> tuple[safe_open, dict]:
    """Returns a mapped file and its header; raises ValueError if it is missing or no file of embeddings."""
    try:
        file = safe_open(path, "pt")
        return file, json.loads((file.metadata() or {})["embeddings"])
    except (SafetensorError, KeyError, OSError) as error:
        reason = f"{path}: missing, truncated or no file of embeddings ({error})"
        raise ValueError(f"{reason}; delete it and run prepare stage=embeddings") from None


def check_origin(path: Path, header: dict, backbone: str, t5_tokens: int) -> None:
    """Raises ValueError unless a header names this backbone and this number of T5 tokens."""
    theirs = {"model.backbone.name": header["backbone"], "model.backbone.t5_tokens": header["t5_tokens"]}
    ours = {"model.backbone.name": backbone, "model.backbone.t5_tokens": t5_tokens}
    for name in ours:
        if theirs[name] != ours[name]:
            raise ValueError(
                f"{path}: embeddings made with {name}={theirs[name]}; this run has {ours[name]}. Set it to the same, "
                "or prepare embeddings for it in another folder"
            )


def check_same_text(folder: Path, stored: str, prompt: str) -> None:
    """Raises ValueError if two prompts have one key."""
    if stored != prompt:
        raise ValueError(f"{folder}: {stored!r} and {prompt!r} have the same key; change one of them by a word")


def prompt_key(prompt: str) -> str:
    """Returns the key of a prompt: the hash of its text."""
    return hashlib.blake2b(prompt.encode(), digest_size=16).hexdigest()
