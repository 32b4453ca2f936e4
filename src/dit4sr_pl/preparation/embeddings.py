"""Prompt embeddings on disk, the writing half: prompts are encoded once, before training. See
`backbone/prompt_cache.py`.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from dit4sr_pl.backbone.prompt_cache import (
    INDEX,
    NOTHING,
    Origin,
    check_origin,
    check_same_text,
    embeddings_hash,
    open_file,
    prompt_key,
)
from dit4sr_pl.common.files import atomic_write, folder_lock


def write_embeddings(
    prompts: Iterable[str],
    encode: Callable[[str], tuple[Tensor, Tensor]],
    folder: str | Path,
    backbone: str,
    t5_tokens: int,
    file_bytes: int,
    shard: tuple[int, int] = (1, 1),
    track: Callable[[list[str]], Iterable[str]] = iter,
    encoders: Mapping[str, str] = NOTHING,
) -> int:
    """Adds the prompts that a cache lacks and returns their number.

    Tasks of different shards may run at once. A killed task loses the file that it was writing and resumes there.

    Args:
        prompts: prompts in any order; equal ones are stored once, and the empty one always.
        encode: function from a prompt to its embeddings `(1, T, D_text)` and pooled ones `(1, D_pooled)`.
        folder: folder of the cache.
        backbone: name of the backbone that `encode` uses.
        t5_tokens: number of T5 tokens that `encode` uses.
        file_bytes: approximate size of a file, and of the embeddings in memory.
        shard: this task's number, from 1, and the number of tasks.
        track: wraps the prompts that are encoded, such as a progress bar.
        encoders: fingerprints of the text encoders and tokenizers that `encode` uses, by part.

    Raises:
        ValueError: the cache has another backbone, other encoders or number of T5 tokens, or a truncated file.
    """
    folder, origin = Path(folder), Origin(backbone, t5_tokens, encoders)
    with folder_lock(folder, shard):
        todo = missing_prompts(prompts, folder, origin, shard)
        last = max(todo, default=None)
        tensors, texts, hashes = {}, {}, {}
        for prompt in track(list(todo.values())):
            key = prompt_key(prompt)
            embeds, pooled = (tensor[0].bfloat16() for tensor in encode(prompt))
            tensors |= {f"{key}.embeds": embeds, f"{key}.pooled": pooled}
            texts[key], hashes[key] = prompt, embeddings_hash(embeds, pooled)
            if sum(tensor.nbytes for tensor in tensors.values()) >= file_bytes or key == last:
                # The metadata has a single entry, since safetensors writes several in random order.
                metadata = {"embeddings": json.dumps(origin.header() | {"prompts": texts, "hashes": hashes})}
                with atomic_write(folder / f"{min(texts)}.safetensors") as partial:
                    save_file(tensors, partial, metadata)
                tensors, texts, hashes = {}, {}, {}
        write_index(folder, origin)
    return len(todo)


def missing_prompts(prompts: Iterable[str], folder: Path, origin: Origin, shard: tuple[int, int]) -> dict[str, str]:
    """Returns this shard's prompts that a cache lacks, by key and in the order of keys; errors are those of
    `write_embeddings`.
    """
    wanted, (number, count) = {}, shard
    for prompt in itertools.chain([""], prompts):
        check_same_text(folder, wanted.setdefault(prompt_key(prompt), prompt), prompt)
    stored = read_headers(folder, origin)
    for key in wanted.keys() & stored.keys():
        check_same_text(folder, stored[key][1], wanted[key])
    todo = [key for key in sorted(wanted) if key not in stored and int(key, 16) % count == number - 1]
    return {key: wanted[key] for key in todo}


def write_index(folder: Path, origin: Origin) -> None:
    """Indexes all files, again if another task added one meanwhile: the last writer has seen all of them."""
    seen = None
    while seen != (files := list_cache_files(folder)):
        seen = files
        stored = read_headers(folder, origin)
        index = origin.header() | {"files": {key: name for key, (name, _) in sorted(stored.items())}}
        with atomic_write(folder / INDEX) as partial:
            partial.write_text(json.dumps(index, indent=0))


def read_headers(folder: Path, origin: Origin) -> dict[str, tuple[str, str]]:
    """Returns the file name and the prompt of every key of a cache; errors are those of `write_embeddings`."""
    stored = {}
    for path in list_cache_files(folder):
        _, header = open_file(path)
        check_origin(path, header, origin)
        stored |= {key: (path.name, prompt) for key, prompt in header["prompts"].items()}
    return stored


def list_cache_files(folder: Path) -> list[Path]:
    """Returns the files of a cache, sorted by name."""
    return sorted(folder.glob("*.safetensors"))
