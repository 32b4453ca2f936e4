"""Values of environment variables and passwords, which no file and no message of this project holds.

In their place stands the variable's name, such as `<HF_TOKEN>`.
"""

import os
import re
from typing import Any

SENSITIVE = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)  # names of variables
SHORTEST = 8  # characters of a value that is looked for within longer texts
PASSWORD_IN_URL = re.compile(r"(?<=://)([^\s/:@]*):[^\s/@]+@")
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")

used: dict[str, str] = {}  # values of the variables that a config has asked for, by name


def note_used(name: str) -> None:
    """Notes that a config has asked for an environment variable."""
    if os.environ.get(name):
        used[name] = os.environ[name]


def hidden(text: str) -> str:
    """Returns a text without values of environment variables that a config has asked for, or that are secret by their
    names, and without passwords. Existing paths stay, since nothing could be found without them.
    """
    secret = {name: value for name, value in os.environ.items() if SENSITIVE.search(name) and len(value) >= SHORTEST}
    secret |= {name: value for name, value in used.items() if not os.path.exists(value)}
    for name, value in sorted(secret.items(), key=lambda item: -len(item[1])):
        if text == value:
            return f"<{name}>"
        if len(value) >= SHORTEST:
            text = text.replace(value, f"<{name}>")
    return HUB_TOKEN.sub("hf_***", PASSWORD_IN_URL.sub(r"\1:***@", text))


def without_secrets(tree: Any) -> Any:
    """Returns nested dicts and lists with `hidden` texts."""
    if isinstance(tree, dict):
        return {key: without_secrets(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without_secrets(value) for value in tree]
    return hidden(tree) if isinstance(tree, str) else tree
