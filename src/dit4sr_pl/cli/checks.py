"""What commands check of a user's config before anything heavy is imported. No PyTorch at import."""

import re
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig

DTYPES = ("float32", "bfloat16", "float16")
SCALES = (1, 8)


def choose_device(name: str) -> str:
    """The first CUDA device for `auto` where there is one.

    Raises:
        ValueError: a device that is not there.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except Exception as error:  # as many kinds as there are devices
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name}: cannot be used ({reason}); take auto, cpu or cuda:N") from None
    return name


def check_readable(path: str | Path, what: str) -> None:
    """Raises FileNotFoundError unless `path` is there; `what` names the config key that gave it."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{what}={path}: no such file or folder")


def check_data(data: DictConfig, written: str = "") -> None:
    """Raises FileNotFoundError for a path of the data config that is not there, ValueError if it names no photos.

    `written` is the option of the sets that the command writes: what it names need not be there.
    """
    for key in ("folders", "validation_folders"):
        for folder in [] if "photos" in data else data[key]:  # the demo writes its own
            check_readable(folder, f"data.{key}")
    named = {name: options for name, options in data.sets.items() if options.folder is not None}
    for name, options in named.items():
        for key in ("folder", "captions", "manifest"):
            if options.get(key) is not None and key != written:
                check_readable(options[key], f"data.sets.{name}.{key}")
    if "photos" in data:
        check_extra("data=demo", "demo", "skimage", "sklearn")
    if not data.folders and not named:
        raise ValueError("no photos; give data.folders=[PATH] or data.sets.NAME.folder=PATH")


def check_scale(scale: float) -> None:
    """Raises ValueError unless images can be restored at this scale."""
    if not isinstance(scale, int | float) or not SCALES[0] <= scale <= SCALES[1]:
        raise ValueError(f"scale={scale}: must be a number from {SCALES[0]} to {SCALES[1]}")


def check_backbone(backbone: DictConfig) -> None:
    """Raises ValueError for an unknown dtype, FileNotFoundError for a model folder or embeddings that are not there; a
    name without `.`, `/` or `~` in front may be a hub id or a shipped model, which only loading can tell."""
    if backbone.dtype not in DTYPES:
        raise ValueError(f"model.backbone.dtype={backbone.dtype}: choose one of {', '.join(DTYPES)}")
    if backbone.name.startswith((".", "/", "~")):
        check_readable(Path(backbone.name) / "model_index.json", "model.backbone.name")
    if backbone.embeddings is not None:
        check_readable(Path(backbone.embeddings) / "index.json", "model.backbone.embeddings")


def check_writable(folder: str | Path, what: str) -> None:
    """Raises ValueError unless files can be made in `folder`, which is made if need be."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # several processes of a run may look at once
    except OSError as error:
        raise ValueError(f"{what}={folder}: cannot be written ({error.strerror}); choose another folder") from None


def read_shard(text: str) -> tuple[int, int]:
    """`i/n`, this task's number from 1 and how many there are.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", str(text))
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"shard={text}: must be i/n with i from 1 to n, such as 1/8 to 8/8 for eight tasks")
    return int(match[1]), int(match[2])


def check_extra(what: str, extra: str, *packages: str) -> None:
    """Raises ValueError unless the packages that `what` needs are installed; the extra of that name installs them."""
    if missing := [package for package in packages if find_spec(package) is None]:
        raise ValueError(f"{what} needs {' and '.join(missing)}; pip install 'dit4sr_pl[{extra}]'")
