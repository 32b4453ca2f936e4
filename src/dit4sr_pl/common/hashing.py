"""Hashes of files, plain values and weights: BLAKE2b, 16 bytes, hexadecimal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def file_hash(path: Path | str) -> str:
    """Returns the hash of a file's bytes, or of the names and sizes of a folder's files.

    Hidden files do not count. The bytes of a folder are not read: folders of weights may hold tens of gigabytes.
    """
    path = Path(path)
    if path.is_dir():
        files = {file.relative_to(path): file.stat().st_size for file in path.rglob("*") if file.is_file()}
        shown = {path: size for path, size in files.items() if not any(name.startswith(".") for name in path.parts)}
        return values_hash({path.as_posix(): size for path, size in shown.items()})
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def values_hash(values: Mapping) -> str:
    """Returns the hash of plain values, whatever the order of their keys."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """Returns the hash of weights by name: the same on every device and in every file."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(state.items()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()
