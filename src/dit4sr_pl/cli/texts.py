"""Paths and texts in a command's arguments, quoted so that Hydra takes them literally.

To Hydra, spaces, accents, commas, quotes, brackets and `=` have a meaning, `2024` is a number, and `${...}` is an
interpolation. A key that is listed here takes the rest of its argument as it is. The lists hold for every command, for
sweeps, and for configs that Python code reads.
"""

import os
import re
from collections.abc import Sequence

PATHS = ("input", "output", "images", "reference", "root", "weights", "checkpoint", "ckpt_path", "embeddings")
PATHS += ("latents", "crops", "trained", "shipped")
PATHS += ("model.checkpoint", "model.backbone.name", "model.backbone.embeddings")
PATHS += ("data.photos", "data.captions", "metric_weights.folder", "captioner.name", "strip.lr", "strip.hr")
PATHS += (r"data\.(sets|pairs)\.[\w-]+\.(folder|captions|manifest|lr|hr)", r"dataset\.(folder|lr|hr|captions)")
PATHS += (r"data\.validation\.(folder|lr|hr|captions)", r"method\.(checkout|python|work|outputs)")
PATHS += (r"metrics\.\w+\.folder", r"method\.weights\.\w+", r"hydra\.run\.dir", r"hydra\.sweep\.dir")
TEXTS = ("prompt", "name", "against", "host", "captioner.instruction")
TEXTS += ("sampler.added_prompt", "sampler.negative_prompt")
TEXTS += (r"data\.pairs\.[\w-]+\.[lh]r_suffix", r"dataset\.([lh]r_suffix|name)", "method.label")
PATH_LISTS = ("data.folders", "data.validation_folders", "data.latents", "runs")
TEXT_LISTS = ("prompts", "captions.dropped_words", "hosts")
ALWAYS_GIVEN = ("input", "output")  # `null` is a name for these
# Commands that read these settings themselves. Others reach libraries, which interpolate what they are given.
READ_ONCE = {
    "restore": ("input", "output", "prompt", "checkpoint"),
    "evaluate": ("images", "reference"),
    "convert": ("input", "output"),
    "compare": ("output", "strip.lr", "strip.hr"),
}
ARGUMENT = re.compile(r"(\+{0,2})([\w.-]+)=(.*)", re.DOTALL)
ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")  # Hydra's escapes of unquoted values, which users had to write before
WITHIN_QUOTES = r"""(?:'(?:\\.|[^'])*'|"(?:\\.|[^"])*"|\\.|[^,])+"""
SWEEP_FUNCTION = re.compile(r"(choice|range|interval|glob|sort|shuffle|tag|extend_list)\(")


def for_hydra(arguments: Sequence[str], command: str) -> list[str]:
    """Returns a command's arguments with all paths and texts quoted, so that Hydra takes them as they are.

    Args:
        arguments: the arguments as the user gave them, without the program's name.
        command: the command's name.

    Raises:
        ValueError: a text holds `${`, which this command cannot keep apart from an interpolation.
    """
    sweeps = any(argument in ("-m", "--multirun") for argument in arguments)
    return [quoted_argument(argument, command, sweeps) for argument in arguments]


def quoted_argument(argument: str, command: str, sweeps: bool) -> str:
    """Returns one argument for Hydra; errors are those of `for_hydra`."""
    match = ARGUMENT.fullmatch(argument)
    if match is None:
        return argument
    prefix, key, value = match.groups()
    is_list = is_one_of(key, PATH_LISTS + TEXT_LISTS)
    if not is_list and not is_one_of(key, PATHS + TEXTS):
        return argument
    if value in ("", "???") or (value == "null" and key not in ALWAYS_GIVEN):
        return argument
    if names_settings(key, value, sweeps) or (sweeps and calls_function(value)):
        return argument
    are_paths = is_one_of(key, PATHS + PATH_LISTS)
    if is_list and value.startswith("[") and value.endswith("]"):
        texts = split(value[1:-1], are_paths)
    else:
        texts = split(value, are_paths) if sweeps and not is_list and are_paths else [value]
    quoted = [quote(plain(text), key, command) for text in texts]
    brackets = "[]" if is_list else ("", "")
    return f"{prefix}{key}={brackets[0]}{','.join(quoted)}{brackets[1]}"


def is_one_of(key: str, keys: tuple[str, ...]) -> bool:
    """Returns whether a key is one of a list of keys and patterns."""
    return any(key == each or re.fullmatch(each, key) for each in keys)


def names_settings(key: str, value: str, sweeps: bool) -> bool:
    """Returns whether a folder's name is an interpolation of other settings: `hydra.run.dir=runs/${seed}` or, in a
    sweep, `output=runs/lr${optimizer.lr}`. Interpolations by a resolver, such as `${oc.env:HOME}`, do not count.
    """
    is_folder = key.startswith("hydra.") or (sweeps and key == "output")
    return is_folder and "${" in value and not re.search(r"\$\{[^}]*:", value) and not os.path.exists(value)


def calls_function(value: str) -> bool:
    """Returns whether the value of a sweep is one of Hydra's functions, such as `glob(*)`."""
    return bool(SWEEP_FUNCTION.match(value)) and not os.path.exists(value)


def split(value: str, are_paths: bool) -> list[str]:
    """Returns the parts of a list at its commas, except commas within quotes and within paths that exist."""
    pieces = re.findall(WITHIN_QUOTES, value) if has_quotes(value) else value.split(",")
    texts = []
    while pieces:
        ends = range(len(pieces), 0, -1) if are_paths else ()
        end = next((n for n in ends if os.path.exists(",".join(pieces[:n]).strip())), 1)
        texts.append(",".join(pieces[:end]).strip())
        pieces = pieces[end:]
    return [text for text in texts if text]


def has_quotes(value: str) -> bool:
    """Returns whether a part of a list is quoted as a whole."""
    return re.search(r"""(^|,)\s*(['"]).*\2\s*(,|$)""", value, re.DOTALL) is not None


def plain(text: str) -> str:
    """Returns a text without the quotes or the escapes that Hydra's grammar asked for, unless a file has this name."""
    if os.path.lexists(text):
        return text
    if len(text) > 1 and text[0] in "'\"" and is_quoted(text):
        return re.sub(rf"(\\+)(?={text[0]}|$)", lambda run: "\\" * (len(run[1]) // 2), text[1:-1])
    return ESCAPED.sub(r"\1", text)


def is_quoted(text: str) -> bool:
    """Returns whether a text is a quoted string to Hydra: all quotation marks inside it are escaped."""
    mark = text[0]
    return re.fullmatch(rf"{mark}(?:\\.|[^{mark}\\])*{mark}", text, re.DOTALL) is not None


def quote(text: str, key: str, command: str) -> str:
    """Returns a text as Hydra's grammar and OmegaConf must be given it to become the text again."""
    if "${" in text:
        if key not in READ_ONCE.get(command, ()):
            raise ValueError(
                f"{key}={text}: holds `${{`, which a config cannot keep apart from an interpolation; rename the file, "
                "or give a link to it"
            )
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return "'" + re.sub(r"(\\+)$", r"\1\1", text) + "'"
