"""The header of an LR-stream or ControlNet file, which names its network and its base. No PyTorch."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

HASH = "content_hash"  # entry of the header: hash of the weights and of the other entries


def check_file(path: Path) -> None:
    """Raises FileNotFoundError unless a file exists."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give an LR-stream file or a training checkpoint (.ckpt)")


def read_header(path: Path) -> dict[str, str]:
    """Returns the header's entries: `settings`, the network config, and `base`, both as JSON.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or of another kind.
    """
    check_file(path)
    try:
        with safe_open(path, "np") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or not safetensors ({error}); copy or train it again") from None
    if not {"settings", "base"} <= header.keys():
        raise ValueError(
            f"{path}: safetensors, but not a trained part (its header names no network); a released network is given "
            "by its folder"
        )
    for key in ("settings", "base"):
        if not is_object(header[key]):
            raise ValueError(f"{path}: damaged (its header cannot be read); copy or train it again")
    return header


def is_object(text: str) -> bool:
    """Returns whether a text is an object of JSON."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def network_and_base(path: Path) -> tuple[dict, dict]:
    """Returns the network config and the base in a file's header; errors are those of `read_header`."""
    header = read_header(path)
    return json.loads(header["settings"]), json.loads(header["base"])
