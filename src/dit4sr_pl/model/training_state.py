"""Training checkpoints, the files that resume a run: read only after all their bytes were checked."""

import errno
import zipfile
from pathlib import Path
from typing import Any

import torch

OURS = {"global_step": int, "state_dict": dict, "settings": dict, "base": dict}  # what every checkpoint holds


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """Reads a training checkpoint; its tensors are mapped from the file.

    PyTorch itself reads a checkpoint with changed bytes without an error: it does not compare the checksums.

    Raises:
        OSError: the file cannot be read now, which does not mean that it is damaged.
        ValueError: it is damaged or something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(checkpoint, dict):
            raise ValueError("it holds no training state")
        if missing := [key for key, kind in OURS.items() if not isinstance(checkpoint.get(key), kind)]:
            raise ValueError(f"it has no {', '.join(missing)}")
        return checkpoint
    except MemoryError:
        raise
    except Exception as error:  # a damaged directory of the archive leads to errors of any kind
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a place before the start
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: truncated or not a checkpoint of ours ({reason}); use an earlier one") from None


def is_whole(path: Path | str) -> bool:
    """Returns whether a checkpoint is complete and undamaged; raises OSError if it cannot be read."""
    try:
        read_checkpoint(path)
    except ValueError:
        return False
    return True
