"""Checks of a user's config that commands make before they import PyTorch."""

import os
import re
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig

from dit4sr_pl.backbone.text_length import check_t5_tokens, longest_prompt
from dit4sr_pl.common.hub import check_access
from dit4sr_pl.restoration.sizes import SCALES

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8", "fp8", "nf4")  # of the frozen base
CAPTIONER_QUANTIZATIONS = ("int8", "nf4")


def choose_device(name: str, backbone: DictConfig | None = None) -> str:
    """Returns the device to use; for `auto` it is the first CUDA device, or the CPU if there is none.

    A CPU that is to run a backbone made for GPUs is worth a line on stderr.

    Args:
        name: `auto`, or PyTorch's name of a device.
        backbone: config of the backbone that the device is to run; None: there is none.

    Raises:
        ValueError: the device cannot be used.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cpu") and backbone is not None and backbone.gpu_memory is not None:
        print(f"warning: no GPU: {backbone.name} runs on the CPU, which takes minutes for a step", file=sys.stderr)
    try:
        torch.empty(1, device=name)
    except Exception as error:  # every kind of device has its own error
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name}: cannot be used ({reason}); take auto, cpu or cuda:N") from None
    return name


def check_readable(path: str | Path, what: str) -> None:
    """Checks that a file or folder exists.

    Args:
        path: the file or folder.
        what: the config key that gave it, for the message.

    Raises:
        FileNotFoundError: it does not exist.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{what}={path}: no such file or folder")


def check_batch_size(size: object) -> None:
    """Raises ValueError unless `size` is a whole number of 1 or more."""
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"batch_size={size}: must be 1 or more")


def check_png_level(level: object) -> None:
    """Raises ValueError unless `level` is a level of compression, or None for the encoder's own."""
    if level not in (None, *range(10)):
        raise ValueError(f"png_level={level}: must be a whole number from 0 to 9, or null")


def check_data(data: DictConfig, written: str = "") -> None:
    """Checks the paths of a data config.

    Args:
        data: the config.
        written: option of the sets that names what the command itself writes, which need not exist.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: the config names no photos.
    """
    for key in ("folders", "validation_folders"):
        for folder in [] if "photos" in data else data[key]:  # the demo writes its photos itself
            check_readable(folder, f"data.{key}")
    named = {name: options for name, options in data.sets.items() if options.folder is not None}
    for name, options in named.items():
        for key in ("folder", "captions", "manifest"):
            if options.get(key) is not None and key != written:
                check_readable(options[key], f"data.sets.{name}.{key}")
    pairs = {name: options for name, options in (data.get("pairs") or {}).items() if options.hr or options.lr}
    for name, options in pairs.items():
        for key in ("lr", "hr", "captions"):
            if key != "captions" and options.get(key) is None:
                raise ValueError(f"data.pairs.{name}: has no {key}; give data.pairs.{name}.{key}=FOLDER")
            if options.get(key) is not None and key != written:
                check_readable(options[key], f"data.pairs.{name}.{key}")
    if "photos" in data:
        check_extra("data=demo", "demo", "skimage", "sklearn")
    latents = data.get("latents")
    for folder in [latents] if isinstance(latents, str) else latents or []:
        check_readable(folder, "data.latents")
    if data.get("captions") is not None:
        if not latents:
            raise ValueError("data.captions belongs to data.latents; photos have data.sets.NAME.captions")
        check_readable(data.captions, "data.captions")
    for key in ("latent_crops", "latents_in_memory"):
        if data.get(key) and not latents:
            raise ValueError(f"data.{key} belongs to data.latents; give data.latents=[FOLDER], too")
    if not data.folders and not named and not pairs and not latents:
        raise ValueError("no photos; give data.folders=[PATH] or data.sets.NAME.folder=PATH")


def check_scale(scale: float) -> None:
    """Checks that images can be restored at this scale.

    Raises:
        ValueError: they cannot.
    """
    if not isinstance(scale, int | float) or not SCALES[0] <= scale <= SCALES[1]:
        raise ValueError(f"scale={scale}: must be a number from {SCALES[0]} to {SCALES[1]}")


def check_backbone(backbone: DictConfig) -> None:
    """Checks the config of a backbone.

    A name that begins with `.`, `/` or `~` is a folder; another one is a folder, a model in this package, or a hub id.

    Raises:
        ValueError: the dtype or the quantization is unknown, bitsandbytes is missing, or prompts are cut to fewer
            tokens than the model's T5 was trained with.
        FileNotFoundError: the folder of the model or of the embeddings does not exist, or the hub's model cannot be
            read.
    """
    if backbone.dtype not in DTYPES:
        raise ValueError(f"model.backbone.dtype={backbone.dtype}: choose one of {', '.join(DTYPES)}")
    if "t5_tokens" in backbone:
        check_t5_tokens(backbone.t5_tokens, longest_prompt(backbone.name), backbone.name)
    if backbone.quantization is not None:
        what = f"model.backbone.quantization={backbone.quantization}"
        if backbone.quantization not in QUANTIZATIONS:
            raise ValueError(f"{what}: choose one of {', '.join(QUANTIZATIONS)}, or null")
        if backbone.quantization == "nf4" and find_spec("bitsandbytes") is None:
            raise ValueError(f"{what} needs bitsandbytes; pip install bitsandbytes, or take int8 or fp8")
    if backbone.name.startswith((".", "/", "~")):
        check_readable(Path(backbone.name) / "model_index.json", "model.backbone.name")
    elif "/" in backbone.name and not Path(backbone.name).exists():
        check_access(backbone.name, "model.backbone.name")
    if backbone.embeddings is not None:
        check_readable(Path(backbone.embeddings) / "index.json", "model.backbone.embeddings")


def check_captioner(captioner: DictConfig) -> None:
    """Checks the config of a caption model.

    Raises:
        ValueError: its type or quantization is unknown, or a package is missing.
        FileNotFoundError: the folder of the model does not exist.
    """
    if captioner.dtype not in DTYPES:
        raise ValueError(f"captioner.dtype={captioner.dtype}: choose one of {', '.join(DTYPES)}")
    if captioner.quantization not in (None, *CAPTIONER_QUANTIZATIONS):
        raise ValueError(f"captioner.quantization={captioner.quantization}: choose int8, nf4 or null")
    if captioner.quantization is not None and find_spec("bitsandbytes") is None:
        raise ValueError(
            f"captioner.quantization={captioner.quantization} needs bitsandbytes; pip install bitsandbytes"
        )
    if captioner.name.startswith((".", "/", "~")):
        check_readable(captioner.name, "captioner.name")


def check_writable(folder: str | Path, what: str) -> None:
    """Checks that files can be written into a folder, and creates it.

    Args:
        folder: the folder.
        what: the config key that gave it, for the message.

    Raises:
        ValueError: nothing can be written there.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{what}={folder}: cannot be written ({error.strerror}); choose another folder") from None


def read_shard(text: str) -> tuple[int, int]:
    """Returns (i, n) of `i/n`: this task's number, from 1, and the number of tasks.

    Raises:
        ValueError: the text is something else.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", str(text))
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"shard={text}: must be i/n with i from 1 to n, such as 1/8 to 8/8 for eight tasks")
    return int(match[1]), int(match[2])


def check_extra(what: str, extra: str, *packages: str) -> None:
    """Raises ValueError unless the packages that `what` needs are installed; the extra of that name installs them."""
    if missing := [package for package in packages if find_spec(package) is None]:
        raise ValueError(f"{what} needs {' and '.join(missing)}; pip install 'dit4sr_pl[{extra}]'")


def check_compiler(compile: bool, key: str) -> None:
    """Raises ValueError if a network is to be compiled and there is no compiler; PyTorch would say so in 40 lines."""
    names = os.environ.get("CXX", "g++"), "clang++"
    if compile and not any(map(shutil.which, names)):
        raise ValueError(f"{key}=true needs a C++ compiler ({' or '.join(names)}); install one, or give {key}=false")


def check_cuda_graph(cuda_graph: bool, device: str) -> None:
    """Raises ValueError if CUDA graphs are to be captured on a device that is no CUDA device."""
    if cuda_graph and not device.startswith("cuda"):
        raise ValueError(f"cuda_graph=true needs a CUDA device, and not {device}; give cuda_graph=false")
