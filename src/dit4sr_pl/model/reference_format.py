"""The layout of the reference implementation: a diffusers folder that holds the base and the LR stream together."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit4sr_pl.common.files import atomic_write
from dit4sr_pl.common.names import check_name
from dit4sr_pl.model.lr_stream import LRStream
from dit4sr_pl.model.variant import Variant

RELEASED_SCALE = 1.2  # injection_scale, a constant of the reference's source
WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
INDEX = f"{WEIGHTS}.index.json"
RELEASED = re.compile(r"transformer_blocks\.(\d+)\.(?:(attn2?)\.to_(q|k|v|out)_control|ff\.control_conv)\.(\w+)")
# The released code builds SD3.5's image-only attention with text projections, and never uses them.
DEAD = re.compile(r"transformer_blocks\.\d+\.attn2\.(add_[qkv]_proj|to_add_out|norm_added_[qk])\.\w+")

log = logging.getLogger(__name__)


class Release:
    """A released folder. Its tensors are read one by one when they are asked for.

    Args:
        folder: the released folder or its `transformer/`.

    Raises:
        FileNotFoundError: the folder has no `config.json` or no weights.
        ValueError: a file is truncated, or the weights do not fit; the message lists them.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.folder = next((f for f in (folder, folder / "transformer") if (f / CONFIG).is_file()), folder)
        if not (self.folder / CONFIG).is_file():
            raise FileNotFoundError(f"{folder}: no config.json; give the released folder or its transformer/")
        self.files = {name: file for file in open_weights(self.folder) for name in file.keys()}  # noqa: SIM118
        used = {name: RELEASED.fullmatch(name) for name in sorted(self.files) if not DEAD.fullmatch(name)}
        self.lr_names = {our_name(match): name for name, match in used.items() if match}
        self.base_names = [name for name, match in used.items() if not match]
        self.check()

    def check(self) -> None:
        """Raises ValueError, with the weights' names, unless names and shapes are those of a DiT4SR."""
        base = self.empty_base()
        with torch.device("meta"):
            lr_stream = LRStream.over(base, Variant())
        wanted = {n: tuple(t.shape) for module in (base, lr_stream) for n, t in module.state_dict().items()}
        names = self.lr_names | {name: name for name in self.base_names}
        found = {ours: tuple(self.files[name].get_slice(name).get_shape()) for ours, name in names.items()}
        missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        other = [f"{n} {found[n]} (wanted {wanted[n]})" for n in wanted.keys() & found.keys() if found[n] != wanted[n]]
        if missing or unknown or other:
            kinds = {"missing": missing, "unknown": unknown, "of another shape": sorted(other)}
            reasons = (f"{kind}: {', '.join(listed) or 'none'}" for kind, listed in kinds.items())
            raise ValueError(f"{self.folder}: not a DiT4SR release; {'; '.join(reasons)}")

    def empty_base(self) -> SD3Transformer2DModel:
        """Returns the frozen transformer without memory for its weights."""
        with torch.device("meta"):
            return SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(self.folder))

    def base(self, dtype: torch.dtype | None = None) -> SD3Transformer2DModel:
        """Returns the frozen transformer in one dtype; None: that of its first weight by name."""
        dtype = dtype or self.files[self.base_names[0]].get_tensor(self.base_names[0]).dtype
        base = self.empty_base()
        base.load_state_dict({name: weight.to(dtype) for name, weight in self.base_weights()}, assign=True)
        return base

    def base_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the frozen transformer's weights, sorted by name."""
        for name in self.base_names:
            yield name, self.files[name].get_tensor(name)

    def lr_state(self) -> dict[str, Tensor]:
        """Returns the LR stream's weights by our names, in the file's dtype."""
        return {ours: self.files[name].get_tensor(name) for ours, name in self.lr_names.items()}


def choose_lr_keys(state: Mapping[str, Tensor], legacy_lr_keys: bool | None, source: str | Path) -> bool:
    """Returns whether an LR stream runs with legacy keys.

    In such a training the key projections never get a gradient, so all of them keep their zero start. An untrained
    stream, whose query projections are zero too, shows nothing and counts as one with keys of its own.

    Args:
        state: the LR stream's weights by our names.
        legacy_lr_keys: what the user says; None: the weights decide.
        source: the folder, for the message.

    Raises:
        ValueError: the user says False, and the weights were trained with legacy keys.
    """
    moved = {kind: any(state[name].any() for name in state if f".{kind}." in name) for kind in "qk"}
    found = moved["q"] and not moved["k"]
    if found and legacy_lr_keys is False:
        raise ValueError(
            f"{source}: every to_k_control is zero, so it was trained with legacy_lr_keys=True, as dit4sr_q and "
            "dit4sr_f were; leave legacy_lr_keys (release=) out, and the weights decide"
        )
    if moved["k"] and legacy_lr_keys:
        log.warning(
            "%s: to_k_control is not zero, as in dit4sr_r1, and legacy_lr_keys=True does not use it; leave "
            "legacy_lr_keys (release=) out, and the weights decide",
            source,
        )
    return found if legacy_lr_keys is None else legacy_lr_keys


def write_released(base: SD3Transformer2DModel, lr_stream: LRStream, folder: Path) -> None:
    """Writes `transformer/` of a released folder, which the reference implementation can run.

    The layout has no place for `injection_scale` and `legacy_lr_keys`. The reference has 1.2 in its source, so the
    injection's weights are multiplied by what is missing, and a source for either kind of keys. It expects text
    projections in `attn2` and never uses them; they are written as zeros.

    Raises:
        ValueError: the reference implementation cannot run this variant.
    """
    variant = lr_stream.variant
    if (variant.lr_integration, variant.lr_residual, variant.lr_injection) != ("joint", True, "conv"):
        raise ValueError(f"{variant}: the reference implementation runs the full variant only; convert one of that")
    state = dict(base.state_dict()) | dead_weights(base)
    for name, tensor in lr_stream.state_dict().items():
        factor = variant.injection_scale / RELEASED_SCALE if ".injection." in name else 1.0
        state[released_name(name)] = (factor * tensor).to(base.dtype)
    state = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    folder = Path(folder) / "transformer"
    with atomic_write(folder / WEIGHTS) as partial:
        save_file(state, partial, metadata={"format": "pt"})
    remove_shards(folder)
    with atomic_write(folder / CONFIG) as partial:  # last: a folder without it is no model
        base.save_config(partial.parent)


def written_over(folder: Path) -> list[Path]:
    """Returns the files of a model in a folder that `write_released` replaces or removes."""
    files = (folder / "transformer" / name for name in (CONFIG, WEIGHTS, INDEX))
    return [file for file in files if file.exists()]


def remove_shards(folder: Path) -> None:
    """Removes the index of former weights and then their files, which every reader would prefer."""
    names = shards_of(folder)
    (folder / INDEX).unlink(missing_ok=True)
    for name in names:
        (folder / name).unlink(missing_ok=True)


def shards_of(folder: Path) -> list[str]:
    """Returns the names of the files in the index of a model's weights; [] without an index.

    Raises:
        ValueError: the index is damaged, or names files elsewhere.
    """
    index = folder / INDEX
    if not index.is_file():
        return []
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted({check_name(name, index) for name in weight_map.values()})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index}: not an index of weights; download the folder again") from None


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


def open_weights(folder: Path) -> list[safe_open]:
    """Opens the weights of a diffusers model folder, one file or shards with an index."""
    names = shards_of(folder) or [WEIGHTS]
    opened = []
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: missing; download the folder again")
        try:
            opened.append(safe_open(folder / name, "pt"))
        except SafetensorError as error:
            raise ValueError(f"{folder / name}: truncated ({error}); download it again") from None
    return opened
