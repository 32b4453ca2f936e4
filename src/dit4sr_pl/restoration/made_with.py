"""The settings that a result was made with, in an extended attribute of its file (`getfattr -d FILE`). No PyTorch.

A file without the attribute, as those of before 0.2 and copies that leave it behind, counts as done, whatever it was
made with.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit4sr_pl.common.hashing import values_hash
from dit4sr_pl.common.hub import HubAddress, locate
from dit4sr_pl.common.part_header import HASH, read_header

ATTRIBUTE = "user.dit4sr_pl.settings"
LONG_TEXT = 80  # characters; a longer text, such as a prompt, is recorded by its hash

log = logging.getLogger(__name__)


def check_same_settings(output: Path, done: Mapping[Path, str | None], settings: Mapping[str, Any]) -> None:
    """Raises ValueError if results that are there were made with other settings; what one lacks is not compared.

    Args:
        output: folder of the results.
        done: the results that a command would leave as they are, with their captions; None: not known before it runs.
        settings: its settings.
    """
    named = []
    for path, caption in done.items():
        theirs, ours = recorded(path), shortened({**settings, "caption": caption})
        if caption is None:
            del ours["caption"]
        if differ := [key for key in ours if theirs.get(key, ours[key]) != ours[key]]:
            texts = [f"{key}={theirs[key]} (now {ours[key]})" for key in differ[:3]]
            named.append(f"{path} with {', '.join(texts)}")
    if named:
        more = f", and {len(named) - 1} more" if len(named) > 1 else ""
        raise ValueError(
            f"output={output}: restored before with other settings: {named[0]}{more}; give another output, "
            "delete them, or overwrite=true to restore all again"
        )


def recorded(path: Path) -> dict[str, Any]:
    """Returns the settings that a result was made with; {}: they are not known."""
    try:
        settings = json.loads(os.getxattr(path, ATTRIBUTE))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def shortened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings with long texts replaced by their hashes."""
    return {key: values_hash({key: text}) if len(str(text)) > LONG_TEXT else text for key, text in settings.items()}


class Recorder:
    """Records the settings of results; a file system that cannot keep them is a warning.

    Args:
        settings: the settings that results depend on.
    """

    def __init__(self, settings: Mapping[str, Any]):
        self.settings, self.told = dict(settings), False

    def add(self, path: Path, caption: str) -> None:
        """Records the settings of one result and its caption."""
        try:
            os.setxattr(path, ATTRIBUTE, json.dumps(shortened({**self.settings, "caption": caption})).encode())
        except OSError as error:
            if not self.told:
                log.warning("%s: its settings are not recorded (%s); only its name will count", path, error.strerror)
            self.told = True


def identity_of_checkpoint(checkpoint: str) -> str:
    """Returns what tells a checkpoint from others without reading it: the hash in its header, or name and size."""
    place = locate(checkpoint)
    if isinstance(place, HubAddress) or place.is_dir():
        return str(checkpoint)
    if place.suffix == ".safetensors" and (content := read_header(place).get(HASH)):
        return content
    return f"{place.name}, {place.stat().st_size} bytes"
