"""The layout of the reference implementation: a diffusers folder that holds the base and the LR stream together."""

import json
import re
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit4sr_pl.common.files import atomic_write
from dit4sr_pl.model.lr_stream import LRStream
from dit4sr_pl.model.variant import Variant

WEIGHTS = "diffusion_pytorch_model.safetensors"
RELEASED = re.compile(r"transformer_blocks\.(\d+)\.(?:(attn2?)\.to_(q|k|v|out)_control|ff\.control_conv)\.(\w+)")
# The released code builds SD3.5's image-only attention with text projections, and never uses them.
DEAD = re.compile(r"transformer_blocks\.\d+\.attn2\.(add_[qkv]_proj|to_add_out|norm_added_[qk])\.\w+")


def read_released(folder: Path) -> tuple[SD3Transformer2DModel, dict[str, Tensor]]:
    """Splits a released folder into the frozen SD3 transformer and the LR stream's weights by our names.

    Raises:
        FileNotFoundError: the folder has no `config.json` or no weights.
        ValueError: a file is truncated, or the weights do not fit; the message lists the keys.
    """
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
        wanted = set(base.state_dict()), set(LRStream.over(base, Variant()).state_dict())
    check_keys(folder, wanted[0] | wanted[1], base_state.keys() | lr_state.keys())
    base.load_state_dict(base_state, assign=True)
    return base, lr_state


def write_released(base: SD3Transformer2DModel, lr_stream: LRStream, folder: Path) -> None:
    """Writes `transformer/` of a released folder, which the reference implementation can run.

    The layout has no place for `legacy_lr_keys` and `injection_scale`, which the reference keeps in its source. It
    expects text projections in `attn2` and never uses them; they are written as zeros.

    Raises:
        ValueError: the reference implementation cannot run this variant.
    """
    variant = lr_stream.variant
    if (variant.lr_integration, variant.lr_residual, variant.lr_injection) != ("joint", True, "conv"):
        raise ValueError(f"{variant}: the reference implementation runs the full variant only")
    state = dict(base.state_dict()) | dead_weights(base)
    for name, tensor in lr_stream.state_dict().items():
        state[released_name(name)] = tensor.to(base.dtype)
    state = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    with atomic_write(Path(folder) / "transformer" / WEIGHTS) as partial:
        save_file(state, partial, metadata={"format": "pt"})
        base.save_config(partial.parent)


def dead_weights(base: SD3Transformer2DModel) -> dict[str, Tensor]:
    """Returns zeros in place of `attn2`'s text projections, which have the shapes of its image projections."""
    dead = {}
    for index, block in enumerate(base.transformer_blocks):
        if block.attn2 is not None:
            own = {"add_q_proj": "to_q", "add_k_proj": "to_k", "add_v_proj": "to_v", "to_add_out": "to_out.0"}
            own |= {"norm_added_q": "norm_q", "norm_added_k": "norm_k"}
            for name, model in own.items():
                for kind, tensor in block.attn2.get_submodule(model).state_dict().items():
                    dead[f"transformer_blocks.{index}.attn2.{name}.{kind}"] = torch.zeros_like(tensor)
    return dead


def our_name(match: re.Match) -> str:
    """Returns our name of a released weight from the match of its name."""
    block, attention, projection, kind = match.groups()
    return f"blocks.{block}.{attention}.{projection}.{kind}" if attention else f"blocks.{block}.injection.conv.{kind}"


def released_name(name: str) -> str:
    """Returns the released name of one of our weights."""
    _, block, layer, projection, kind = name.split(".")
    inner = "ff.control_conv" if layer == "injection" else f"{layer}.to_{projection}_control"
    return f"transformer_blocks.{block}.{inner}.{kind}"


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Returns all tensors of a diffusers model folder, from one file or from shards with an index."""
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
    """Raises ValueError, which lists the keys, unless exactly the wanted keys were found."""
    if wanted != found:
        missing, unknown = ", ".join(sorted(wanted - found)), ", ".join(sorted(found - wanted))
        raise ValueError(f"{folder}: not a DiT4SR release; missing: {missing or 'none'}; unknown: {unknown or 'none'}")
