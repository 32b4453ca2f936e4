"""Prompt embeddings on disk, the writing half: prompts are encoded once, before training."""

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from dit4sr_pl.backbone.prompt_cache import INDEX, check_origin, check_same_text, open_file, prompt_key
from dit4sr_pl.common.files import atomic_write


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
            with atomic_write(folder / f"{min(texts)}.safetensors", writer) as partial:
                save_file(tensors, partial, metadata)
            tensors, texts = {}, {}
    write_index(folder, origin, writer)
    return len(todo)


def write_index(folder: Path, origin: dict, writer: str) -> None:
    """Indexes all files, again if another task added one meanwhile: whoever writes last has seen all of them."""
    seen = None
    while seen != (files := list_cache_files(folder)):
        seen = files
        stored = read_headers(folder, **origin)
        index = origin | {"files": {key: name for key, (name, _) in sorted(stored.items())}}
        with atomic_write(folder / INDEX, writer) as partial:
            partial.write_text(json.dumps(index, indent=0))


def read_headers(folder: Path, backbone: str, t5_tokens: int) -> dict[str, tuple[str, str]]:
    """Per key of a cache the name of its file and its prompt; errors as of `write_embeddings`."""
    stored = {}
    for path in list_cache_files(folder):
        _, header = open_file(path)
        check_origin(path, header, backbone, t5_tokens)
        stored |= {key: (path.name, prompt) for key, prompt in header["prompts"].items()}
    return stored


def list_cache_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))
