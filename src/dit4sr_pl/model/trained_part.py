"""Files of trained parts: one safetensors file that names its network and the base that it was trained over."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from dit4sr_pl.common.files import atomic_write
from dit4sr_pl.common.hashing import values_hash, weights_hash
from dit4sr_pl.common.hub import RELEASED_BASE
from dit4sr_pl.common.part_header import HASH, check_file, read_header
from dit4sr_pl.common.students import student_label
from dit4sr_pl.model.controlnet import SD3ControlNet
from dit4sr_pl.model.lora import plain_weights
from dit4sr_pl.model.reference_format import RELEASED_SCALE, Release, choose_lr_keys
from dit4sr_pl.model.training_state import read_checkpoint
from dit4sr_pl.model.transformer import DiT4SRTransformer
from dit4sr_pl.model.variant import Variant

SAMPLES = 64  # values per weight that the fingerprint of a base covers


@dataclass(frozen=True)
class TrainedPart:
    """Weights of a trained part, an LR stream or a ControlNet, and what they belong to.

    Args:
        network_config: kind of the network (`network`) and the switches that it was made with.
        base: `name` and `fingerprint` of the base that the weights were trained over, and the fingerprints of the
            backbone's other parts (`parts`), unless the file is of before 0.2.
        state: weights by name.
    """

    network_config: dict
    base: dict[str, Any]
    state: dict[str, Tensor]


def method_and_variant(network_config: dict) -> tuple[str, str]:
    """Returns the network's row in the paper's Table 1 and, for Table 3, its name in `conf/ablation/`.

    Students, such as `DiT4SR, 4 steps`, are in neither; those of FULL need no variant.
    """
    if network_config["network"] == "sd3_controlnet":
        return "SD3-ControlNet", ""
    variant = Variant(**network_config["variant"]).name
    if (student := network_config.get("student")) is None:
        return "DiT4SR", variant
    return f"DiT4SR, {student_label(student)}", "" if variant == "full" else variant


def with_injection_scale(network_config: dict, injection_scale: float | None, source: str | Path) -> dict:
    """Returns a network config with another factor of LR Injection; None: its own.

    Raises:
        ValueError: the factor is not a number, or the network has no LR Injection.
    """
    if injection_scale is None:
        return network_config
    if isinstance(injection_scale, bool) or not isinstance(injection_scale, int | float):
        raise ValueError(f"injection_scale={injection_scale}: must be a number, or null for the checkpoint's own")
    if not math.isfinite(injection_scale):
        raise ValueError(f"injection_scale={injection_scale}: must be finite")
    if network_config.get("variant", {}).get("lr_injection", "none") == "none":
        raise ValueError(
            f"injection_scale={injection_scale}: the network of {source} has no LR Injection; leave it out"
        )
    return network_config | {"variant": network_config["variant"] | {"injection_scale": float(injection_scale)}}


def fingerprint(base: SD3Transformer2DModel) -> str:
    """Returns a hash of a few values per weight of a base; it is the same in float32, bfloat16 and float16.

    A quantized base keeps that of its weights before, and LoRA does not count.
    """
    kept = getattr(base, "original_fingerprint", None)
    return kept or weights_fingerprint(sorted(plain_weights(base).items()))


def weights_fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Returns the fingerprint of a base from its weights, sorted by name; they are read one after another."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in weights:
        values = weight.flatten()[:: max(1, weight.numel() // SAMPLES)][:SAMPLES]
        # Steps of 1/1024, since float16 rounds bfloat16's smallest values.
        levels = (values.bfloat16().float() * 1024).round().int().cpu()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + levels.numpy().tobytes())
    return digest.hexdigest()


def base_of(net: nn.Module, name: str) -> dict[str, str]:
    """Returns name and fingerprint of a network's base, which identify it in files."""
    return {"name": name, "fingerprint": fingerprint(net.base)}


def part_of(net: nn.Module, base: dict[str, str]) -> TrainedPart:
    """Returns the trained part of a network, with its weights on the CPU in float32.

    If the network is sharded, every process must call this, and only the first one gets weights.
    """
    state = get_model_state_dict(net.trained, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return TrainedPart(net.network_config(), base, {name: tensor.float() for name, tensor in state.items()})


def save_part(part: TrainedPart, path: str | Path) -> None:
    """Writes a trained part as one safetensors file, atomically."""
    state = {name: tensor.contiguous() for name, tensor in part.state.items()}
    # Files and checkpoints keep the key `settings` for the network config, so that older ones can be read.
    header = {"settings": json.dumps(part.network_config), "base": json.dumps(part.base)}
    header[HASH] = content_hash(header, state)
    with atomic_write(Path(path)) as partial:
        save_file(state, partial, header)


def content_hash(header: Mapping[str, str], state: Mapping[str, Tensor]) -> str:
    """Returns the hash of a file's weights and of what its header says about them."""
    return values_hash({"settings": header["settings"], "base": header["base"], "weights": weights_hash(state)})


def load_part(path: str | Path) -> TrainedPart:
    """Reads what `save_part` wrote, the averaged weights of a training checkpoint (`.ckpt`), or a released folder.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file cannot be read.
        ValueError: the file is truncated, damaged or of another kind.
    """
    path = Path(path)
    if path.is_dir():
        return load_release(path)
    if path.name.endswith((".ckpt", ".ckpt.aside")):
        return load_checkpoint(path)
    header, state = read_header(path), load_file(path)
    if header.get(HASH) not in (None, content_hash(header, state)):  # files of 0.1 have none
        raise ValueError(f"{path}: damaged (its contents do not match the hash in its header); copy or train it again")
    return TrainedPart(json.loads(header["settings"]), json.loads(header["base"]), state)


def load_checkpoint(path: Path) -> TrainedPart:
    """Reads the averaged weights of a training checkpoint; errors are those of `load_part`."""
    check_file(path)
    checkpoint = read_checkpoint(path)
    prefixes = tuple(f"{network.trained_name}." for network in (DiT4SRTransformer, SD3ControlNet))
    weights = checkpoint["state_dict"].items()  # with those of a critic, if the training has one
    state = {name.partition(".")[2]: tensor for name, tensor in weights if name.startswith(prefixes)}
    return TrainedPart(checkpoint["settings"], checkpoint["base"], state)


def load_release(
    folder: str | Path,
    base_name: str = RELEASED_BASE,
    legacy_lr_keys: bool | None = None,
    injection_scale: float = RELEASED_SCALE,
) -> TrainedPart:
    """Reads the LR stream of a released folder; of the base, a few values per weight are read for its fingerprint.

    Args:
        folder: the released folder or its `transformer/`.
        base_name: name of the base that it was trained over.
        legacy_lr_keys: see `choose_lr_keys`.
        injection_scale: 1.2 in all releases.

    Raises:
        FileNotFoundError: see `Release`.
        ValueError: see `Release` and `choose_lr_keys`.
    """
    release = Release(folder)
    state = release.lr_state()
    variant = Variant(
        injection_scale=injection_scale, legacy_lr_keys=choose_lr_keys(state, legacy_lr_keys, release.folder)
    )
    base = {"name": base_name, "fingerprint": weights_fingerprint(release.base_weights())}
    return TrainedPart({"network": "dit4sr", "variant": variant.as_dict()}, base, state)


def check_network_config(
    net: nn.Module, network_config: dict, source: str | Path, may_differ: tuple[str, ...] = ()
) -> None:
    """Checks that a network has the config with which a trained part was trained.

    Names and shapes of weights do not suffice: they are the same for the variants B and FULL.

    Args:
        net: the network.
        network_config: the trained part's config.
        source: the trained part's file, for the message.
        may_differ: keys in which the two may differ.

    Raises:
        ValueError: the network was made with another config; the message has the keys that differ.
    """
    ours, theirs = flat_config(net.network_config()), flat_config(network_config)
    different = sorted(key for key in (ours.keys() | theirs.keys()) - {*may_differ} if ours.get(key) != theirs.get(key))
    if different:
        here = [key for key in different if key in network_config.get("variant", {})]
        settings = " ".join(f"model.network.variant.{key}={str(theirs[key]).lower()}" for key in here)
        advice = f"; give {settings} for the same" if here else ""
        trained, network = ({key: config.get(key) for key in different} for config in (theirs, ours))
        raise ValueError(f"{source}: trained as {trained}; this network is {network}{advice}")


def flat_config(network_config: dict) -> dict:
    """Returns a network config with the fields of the variant beside its keys; those of a student and of
    LoRA have prefixes."""
    sections = {key: value for key, value in network_config.items() if key in ("student", "lora")}
    prefixed = {f"{key}.{name}": value for key, fields in sections.items() for name, value in fields.items()}
    rest = {key: value for key, value in network_config.items() if key not in ("variant", *sections)}
    return rest | network_config.get("variant", {}) | prefixed


def fit_part(net: nn.Module, part: TrainedPart, source: str | Path) -> None:
    """Copies a trained part's weights into a network over the same base.

    Raises:
        ValueError: the base is another one, or keys or shapes differ; the message names the first few.
    """
    check_base(net.base, part.base, source)
    fit_state(net.trained, part.state, source)


def check_base(base: SD3Transformer2DModel, trained_over: dict[str, str], source: str | Path) -> None:
    """Raises ValueError unless `base` is the model that a trained part belongs to."""
    if trained_over["fingerprint"] != fingerprint(base):
        raise ValueError(
            f"{source}: trained over {trained_over['name']}, and this base model has other weights; "
            "give the same one (backbone=NAME, in train model=NAME, or model.backbone.name=PATH)"
        )


def fit_state(trained: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Copies weights into a module; raises ValueError, with the first few differences, if keys or shapes differ."""
    ours = {name: tuple(tensor.shape) for name, tensor in trained.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if ours != theirs:
        different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        listed = ", ".join(f"{name} {theirs.get(name)} (wanted {ours.get(name)})" for name in different[:3])
        raise ValueError(
            f"{source}: another architecture: {len(different)} weights differ, such as {listed}; give its own backbone"
        )
    trained.load_state_dict(state)
