"""Prompt embeddings on disk: encoded once, read in training without a text encoder.

A cache is a folder of safetensors files and their index:

    index.json               {"backbone": name, "t5_tokens": n, "files": {key: file name}}
    <key>.safetensors        per prompt <key>.embeds (T, D_text) and <key>.pooled (D_pooled), bfloat16;
                             its header holds backbone, t5_tokens and the prompts' texts by key

A prompt's key is the hash of its text. A file is named by its first key and complete once it has its name: the files
are the truth, the index is made from their headers.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit4sr_pl.common.files import replacing

INDEX = "index.json"


class PromptCache:
    """Reads what `write_embeddings` wrote, in the place of a `PromptEncoder`; tensors are mapped from the files.

    Args:
        folder: of the cache.
        backbone, t5_tokens: of the run that reads; the cache must have been made with the same.
        dtype: of the tensors given.

    Raises:
        FileNotFoundError: no cache there.
        ValueError: made with another backbone or number of T5 tokens.
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
        """Prompt embeddings `(B, 77 + t5_tokens, D_text)` and pooled ones `(B, D_pooled)` for SD3's tokenizers.

        Raises:
            ValueError: a prompt that is not in the cache, a truncated file.
        """
        embeds, pooled = zip(*map(self.read, prompts), strict=True)
        return torch.stack(embeds).to(device, self.dtype), torch.stack(pooled).to(device, self.dtype)

    def read(self, prompt: str) -> tuple[Tensor, Tensor]:
        key = prompt_key(prompt)
        if key not in self.files:
            raise ValueError(
                f"{self.folder}: holds no embeddings of the prompt {prompt!r}; run prepare stage=embeddings"
            )
        file, prompts = self.open(self.files[key])
        check_same_text(self.folder, prompts[key], prompt)
        return file.get_tensor(f"{key}.embeds"), file.get_tensor(f"{key}.pooled")

    def open(self, name: str) -> tuple[safe_open, dict[str, str]]:
        if name not in self.opened:
            file, header = open_file(self.folder / name)
            self.opened[name] = file, header["prompts"]
        return self.opened[name]


def write_embeddings(
    prompts: Iterable[str],
    encode: Callable[[str], tuple[Tensor, Tensor]],
    folder: str | Path,
    backbone: str,
    t5_tokens: int,
    file_bytes: int,
    shard: tuple[int, int] = (1, 1),
    track: Callable[[list[str]], Iterable[str]] = iter,
) -> int:
    """Adds the prompts that a cache lacks, part `shard[0]` (from 1) of `shard[1]` of them; returns how many those were.

    Tasks of different parts may run at once. A killed one loses the file it was at and goes on there.

    Args:
        prompts: any, in any order; equal ones are stored once, and the empty one always.
        encode: a prompt to its embeddings `(1, T, D_text)` and pooled ones `(1, D_pooled)`.
        backbone, t5_tokens: what `encode` encodes with.
        file_bytes: about the size of a file, and of what is held in memory.
        track: what to iterate the prompts to encode through, such as a progress bar.

    Raises:
        ValueError: the cache is of another backbone or number of T5 tokens, or has a truncated file.
    """
    folder, (number, count) = Path(folder), shard
    writer = f".{number}-of-{count}"
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f".*{writer}.partial"):
        leftover.unlink()

    wanted = {}
    for prompt in itertools.chain([""], prompts):
        check_same_text(folder, wanted.setdefault(prompt_key(prompt), prompt), prompt)
    stored = read_headers(folder, backbone, t5_tokens)
    for key in wanted.keys() & stored.keys():
        check_same_text(folder, stored[key][1], wanted[key])
    todo = [key for key in sorted(wanted) if key not in stored and int(key, 16) % count == number - 1]

    origin = {"backbone": backbone, "t5_tokens": t5_tokens}
    tensors, texts = {}, {}
    for prompt in track([wanted[key] for key in todo]):
        key = prompt_key(prompt)
        embeds, pooled = encode(prompt)
        tensors |= {f"{key}.embeds": embeds[0].bfloat16(), f"{key}.pooled": pooled[0].bfloat16()}
        texts[key] = prompt
        if sum(tensor.nbytes for tensor in tensors.values()) >= file_bytes or key == todo[-1]:
            # One entry of metadata: of several, safetensors writes the order at random.
            metadata = {"embeddings": json.dumps(origin | {"prompts": texts})}
            with replacing(folder / f"{min(texts)}.safetensors", writer) as partial:
                save_file(tensors, partial, metadata)
            tensors, texts = {}, {}
    write_index(folder, origin, writer)
    return len(todo)


def write_index(folder: Path, origin: dict, writer: str) -> None:
    """Indexes all files, again if another task added one meanwhile: whoever writes last has seen all of them."""
    seen = None
    while seen != (files := list_files(folder)):
        seen = files
        stored = read_headers(folder, **origin)
        index = origin | {"files": {key: name for key, (name, _) in sorted(stored.items())}}
        with replacing(folder / INDEX, writer) as partial:
            partial.write_text(json.dumps(index, indent=0))


def read_headers(folder: Path, backbone: str, t5_tokens: int) -> dict[str, tuple[str, str]]:
    """Per key of a cache the name of its file and its prompt; errors as of `write_embeddings`."""
    stored = {}
    for path in list_files(folder):
        _, header = open_file(path)
        check_origin(path, header, backbone, t5_tokens)
        stored |= {key: (path.name, prompt) for key, prompt in header["prompts"].items()}
    return stored


def list_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def open_file(path: Path) -> tuple[safe_open, dict]:
    """A file, mapped, and its header."""
    try:
        file = safe_open(path, "pt")
        return file, json.loads((file.metadata() or {})["embeddings"])
    except (SafetensorError, KeyError, OSError) as error:
        reason = f"{path}: missing, truncated or no file of embeddings ({error})"
        raise ValueError(f"{reason}; delete it and run prepare stage=embeddings") from None


def check_origin(path: Path, header: dict, backbone: str, t5_tokens: int) -> None:
    theirs = {"model.backbone.name": header["backbone"], "model.backbone.t5_tokens": header["t5_tokens"]}
    ours = {"model.backbone.name": backbone, "model.backbone.t5_tokens": t5_tokens}
    for name in ours:
        if theirs[name] != ours[name]:
            raise ValueError(
                f"{path}: embeddings made with {name}={theirs[name]}; this run has {ours[name]}. Set it to the same, "
                "or prepare embeddings for it in another folder"
            )


def check_same_text(folder: Path, stored: str, prompt: str) -> None:
    if stored != prompt:
        raise ValueError(f"{folder}: {stored!r} and {prompt!r} have the same key; change one of them by a word")


def prompt_key(prompt: str) -> str:
    return hashlib.blake2b(prompt.encode(), digest_size=16).hexdigest()
