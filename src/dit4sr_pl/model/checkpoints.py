"""Weights in and out: LR-stream files of our own, and the reference implementation's released folders."""

import json
import os
import re
from pathlib import Path
from pickle import UnpicklingError

import torch
from diffusers import SD3Transformer2DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit4sr_pl.model.lr_stream import LRStream
from dit4sr_pl.model.variant import Variant

WEIGHTS = "diffusion_pytorch_model.safetensors"
RELEASED = re.compile(r"transformer_blocks\.(\d+)\.(?:(attn2?)\.to_(q|k|v|out)_control|ff\.control_conv)\.(\w+)")
# The released code builds SD3.5's image-only attention with text projections, and never uses them.
DEAD = re.compile(r"transformer_blocks\.\d+\.attn2\.(add_[qkv]_proj|to_add_out|norm_added_[qk])\.\w+")


def save_lr_stream(lr_stream: LRStream, path: str | Path) -> None:
    """Writes the LR stream's weights (float32) and its variant as one safetensors file, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().float().contiguous() for name, tensor in lr_stream.state_dict().items()}
    partial = path.with_suffix(".partial")
    save_file(state, partial, metadata={"variant": json.dumps(lr_stream.variant.as_dict())})
    os.replace(partial, path)


def load_lr_stream(path: str | Path) -> tuple[Variant, dict[str, Tensor]]:
    """Reads an LR stream: what `save_lr_stream` wrote, or the averaged weights of a training checkpoint (`.ckpt`).

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such LR-stream file or checkpoint")
    if path.suffix == ".ckpt":
        return load_checkpoint(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or not safetensors ({error}); copy or train it again") from None
    if "variant" not in metadata:
        raise ValueError(f"{path}: safetensors, but not an LR-stream file (its header names no variant)")
    return Variant(**json.loads(metadata["variant"])), state


def load_checkpoint(path: Path) -> tuple[Variant, dict[str, Tensor]]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        variant, state = checkpoint["variant"], checkpoint["state_dict"]
    except (RuntimeError, EOFError, KeyError, UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: truncated or not a checkpoint of ours ({reason}); use an earlier one") from None
    return Variant(**variant), {name.removeprefix("lr_stream."): tensor for name, tensor in state.items()}


def fit_lr_stream(lr_stream: LRStream, state: dict[str, Tensor], source: str | Path) -> None:
    """Copies weights into an LR stream of the same architecture.

    Raises:
        ValueError: keys or shapes that differ, with the first few of them.
    """
    ours = {name: tuple(tensor.shape) for name, tensor in lr_stream.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if ours != theirs:
        different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        listed = ", ".join(f"{name} {theirs.get(name)} (wanted {ours.get(name)})" for name in different[:3])
        raise ValueError(f"{source}: of another architecture: {len(different)} weights differ, such as {listed}")
    lr_stream.load_state_dict(state)


def read_reference(folder: Path) -> tuple[SD3Transformer2DModel, dict[str, Tensor]]:
    """Splits a released folder into the frozen SD3 transformer and the LR stream's weights by our names."""
    folder = next((f for f in (folder, folder / "transformer") if (f / "config.json").is_file()), None) or folder
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json; give the released folder or its transformer/")

    base_state, lr_state = {}, {}
    for name, tensor in read_weights(folder).items():
        if match := RELEASED.fullmatch(name):
            lr_state[our_name(match)] = tensor
        elif not DEAD.fullmatch(name):
            base_state[name] = tensor

    with torch.device("meta"):
        base = SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(folder))
        wanted = set(base.state_dict()), set(LRStream(base, Variant()).state_dict())
    check_keys(folder, wanted[0] | wanted[1], base_state.keys() | lr_state.keys())
    base.load_state_dict(base_state, assign=True)
    return base, lr_state


def our_name(match: re.Match) -> str:
    block, attention, projection, kind = match.groups()
    return f"blocks.{block}.{attention}.{projection}.{kind}" if attention else f"blocks.{block}.injection.conv.{kind}"


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a diffusers model folder, one file or shards with an index."""
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = [WEIGHTS]
    state = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: missing; download the folder again")
        try:
            state |= load_file(folder / name)
        except SafetensorError as error:
            raise ValueError(f"{folder / name}: truncated ({error}); download it again") from None
    return state


def check_keys(folder: Path, wanted: set[str], found: set[str]) -> None:
    if wanted != found:
        missing, unknown = ", ".join(sorted(wanted - found)), ", ".join(sorted(found - wanted))
        raise ValueError(f"{folder}: not a DiT4SR release; missing: {missing or 'none'}; unknown: {unknown or 'none'}")
