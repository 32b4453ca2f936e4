"""Released folders of toy size, stored as the authors' may be: in half precision, in shards, with zero keys; and prompt
embeddings."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from dit4sr_pl.backbone.prompt_cache import embeddings_hash, prompt_key
from dit4sr_pl.common.files import atomic_write
from dit4sr_pl.common.hub import PROMPTS
from dit4sr_pl.model import DiT4SRTransformer, Variant
from dit4sr_pl.model.reference_format import WEIGHTS, write_released
from testing import ROOT
from testing.networks import randomise
from testing.toy_runs import TOY_SD3

GOLDEN = ROOT / "tests" / "golden"


def write_release(
    folder: Path,
    source: Path = GOLDEN / "q_dual",
    frozen: torch.dtype = torch.float32,
    control: torch.dtype | None = None,
    zero_keys: bool = False,
    shards: int = 1,
) -> Path:
    """Writes a copy of a released folder and returns it.

    Args:
        folder: the folder to write; `transformer/` is made in it.
        source: the folder to copy.
        frozen: dtype of the frozen weights.
        control: dtype of the LR stream's weights; None: that of the frozen ones.
        zero_keys: whether every `to_k_control` is zero, as in dit4sr_q and dit4sr_f, which nothing trained.
        shards: number of weight files.
    """
    state = load_file(source / "transformer" / WEIGHTS)
    for name, weight in state.items():
        state[name] = weight.to((control or frozen) if "_control" in name or ".control_" in name else frozen)
        if zero_keys and ".to_k_control." in name:
            state[name].zero_()
    target = folder / "transformer"
    target.mkdir(parents=True)
    shutil.copy(source / "transformer" / "config.json", target)
    if shards == 1:
        save_file(state, target / WEIGHTS, {"format": "pt"})
        return folder
    names, weight_map = sorted(state), {}
    for shard in range(shards):
        file = WEIGHTS.replace(".safetensors", f"-{shard + 1:05}-of-{shards:05}.safetensors")
        weight_map |= dict.fromkeys(names[shard::shards], file)
        save_file({name: state[name] for name in names[shard::shards]}, target / file, {"format": "pt"})
    (target / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_toy_release(folder: Path, legacy: bool) -> Path:
    """Writes a release over the toy SD3 pipeline, with random weights, and returns it.

    Args:
        folder: the folder to write; `transformer/` is made in it.
        legacy: whether it was trained with legacy LR keys, as dit4sr_q, or with keys of its own, as dit4sr_r1.
    """
    base = SD3Transformer2DModel.from_pretrained(TOY_SD3, subfolder="transformer")
    net = DiT4SRTransformer(base, Variant(injection_scale=1.2, legacy_lr_keys=legacy))
    randomise(net.lr_stream)
    if legacy:
        for name, weight in net.lr_stream.named_parameters():
            if ".k." in name:
                weight.detach().zero_()
    write_released(base, net.lr_stream, folder)
    return folder


def write_toy_prompts(folder: Path) -> Path:
    """Writes random prompt embeddings, as they come with weights, and returns their file."""
    key, embeds, pooled = prompt_key(""), torch.rand(4, 60), torch.rand(3)
    header = {"backbone": "toy", "fingerprint": "0", "text_encoders": {"text_encoder": "1"}, "t5_tokens": 2}
    header |= {"prompts": {key: ""}, "hashes": {key: embeddings_hash(embeds, pooled)}}
    with atomic_write(folder / PROMPTS) as partial:
        save_file({f"{key}.embeds": embeds, f"{key}.pooled": pooled}, partial, {"embeddings": json.dumps(header)})
    return folder / PROMPTS
