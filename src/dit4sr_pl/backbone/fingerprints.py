"""Fingerprints of a backbone's parts: a few values of every weight and the small files, so no part is read whole.

They are the same in float32, bfloat16 and float16. What is not on this machine yet has none.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit4sr_pl.common.hub import pipeline_folder
from dit4sr_pl.model.trained_part import weights_fingerprint

log = logging.getLogger(__name__)

TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
PARTS = ("vae", "scheduler", *TEXT_PARTS)  # the transformer's fingerprint is that of its weights in memory
WORDS = ("vocab.json", "merges.txt", "spiece.model", "tokenizer.json")  # vocabularies of SD3's tokenizers
WITHOUT_WEIGHTS = ("tokenizer", "scheduler")
# Settings that change what a part computes. Others are defaults, which diffusers adds when it saves a folder again.
SETTINGS = ("scaling_factor", "shift_factor", "shift", "num_train_timesteps", "use_dynamic_shifting", "base_shift")
SETTINGS += ("max_shift", "invert_sigmas", "model_max_length", "do_lower_case")
SAMPLE = 4096  # bytes at each place of a file in PyTorch's format that are read
PLACES = 64


def part_fingerprints(name: str, known: Collection[str] = ()) -> dict[str, str]:
    """Returns the fingerprints of a backbone's parts, without the transformer.

    Args:
        name: folder or hub id, see `pipeline_folder`.
        known: parts that are left out.
    """
    try:
        folder = pipeline_folder(name)
    except ValueError:  # neither a folder nor a possible name on the hub
        return {}
    parts = [part for part in PARTS if folder is not None and part not in known and (folder / part).is_dir()]
    found = {part: part_fingerprint(folder / part) for part in parts}
    return {part: fingerprint for part, fingerprint in found.items() if fingerprint is not None}


def part_fingerprint(folder: Path) -> str | None:
    """Returns the fingerprint of one part; None: it cannot be read, which is said where it is needed."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        files = weight_files(folder)
        tensors = [file for file in files if file.suffix == ".safetensors"]
        digest.update(weights_fingerprint(weights_of(tensors)).encode() if tensors else b"")
        for file in files:
            if file.suffix != ".safetensors":
                digest.update(sampled(file))
        if not files and not folder.name.startswith(WITHOUT_WEIGHTS):
            return None
        for file in [folder / name for name in WORDS if (folder / name).is_file()]:
            digest.update(file.name.encode() + file.read_bytes())
        for file in sorted(folder.glob("*config.json")):
            digest.update(json.dumps(settings_of(file), sort_keys=True).encode())
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Returns the files of weights that diffusers and transformers read: not those of a variant such as `fp16`."""
    for stem in ("diffusion_pytorch_model", "model"):
        index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        if single.is_file():
            return [single]
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / Path(shard).name for shard in sorted(set(shards))]
    return [folder / name for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin") if (folder / name).is_file()]


def weights_of(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights of safetensors files by name, sorted; their values are mapped, not read."""
    opened = [safe_open(file, "pt") for file in files]
    owners = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
    for name in sorted(owners):
        tensor = owners[name].get_tensor(name)
        yield name, tensor if tensor.is_floating_point() else tensor.to(torch.float32)


def sampled(file: Path) -> bytes:
    """Returns a file's size and some of its bytes."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        places = sorted({max(0, size - SAMPLE) * place // PLACES for place in range(PLACES + 1)})
        return str(size).encode() + b"".join(opened.read(SAMPLE) for place in places if opened.seek(place) >= 0)


def settings_of(config: Path) -> dict[str, object]:
    """Returns the settings in a part's config that change what it computes."""
    read = json.loads(config.read_text(encoding="utf-8"))
    return {name: read[name] for name in SETTINGS if read.get(name) not in (None, False)}


def differing(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Returns the parts of which both have a fingerprint, and not the same one."""
    return [part for part in PARTS if part in ours and theirs.get(part, ours[part]) != ours[part]]


def check_parts(name: str, ours: Mapping[str, str], theirs: Mapping[str, str], source: str | Path) -> None:
    """Compares a backbone's parts with those that a network was trained over; a text encoder may be another one.

    Args:
        name: the backbone's name.
        ours: its fingerprints.
        theirs: the recorded ones; parts without one are not compared.
        source: the file with the record, for the message.

    Raises:
        ValueError: the autoencoder is another one, whose latents mean something else.
    """
    changed = differing(ours, theirs)
    if "vae" in changed:
        raise ValueError(
            f"{source}: trained over another autoencoder than the vae of {name}; give the folder that it was trained "
            "over (model.backbone.name=PATH)"
        )
    if changed:
        log.warning("%s: trained over other parts than %s has now: %s", source, name, ", ".join(changed))
