"""Restoring with a release by its name: what is typed, downloaded and waited for, and what SD3.5-medium takes in GB.

    python benchmarks/hub.py

A hub on this machine has a release and a backbone of toy size. The command, one step of one photo, runs twice, each
time in a process of its own. Sizes of the real files follow from the published configs: numbers of weights, two bytes
each.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from dit4sr_pl.common.files import ASSETS
from dit4sr_pl.common.hub import RELEASED_BASE
from dit4sr_pl.model import DiT4SRTransformer
from dit4sr_pl.model.reference_format import dead_weights
from dit4sr_pl.planning.meta_backbone import MetaBackbone
from testing.local_hub import LocalHub
from testing.releases import write_toy_release
from testing.toy_runs import TOY_SD3

HALF = 2  # bytes of a weight


def restore(hub: LocalHub, folder: Path, output: str) -> tuple[int, float]:
    """Runs the command and returns the bytes of files that it downloaded, and its seconds."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    arguments = [f"input={folder / 'photo.png'}", f"output={folder / output}", "checkpoint=dit4sr_q"]
    toy = ["sampler.steps=1", "sampler.smallest=1", "device=cpu"]
    before, start = hub.sent, time.perf_counter()
    command = [sys.executable, "-m", "dit4sr_pl.restore", *arguments, *toy]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return hub.sent - before, time.perf_counter() - start


def weights(state: dict[str, torch.Tensor]) -> int:
    """Returns the bytes of a state in half precision."""
    return HALF * sum(tensor.numel() for tensor in state.values())


def main() -> None:
    """Prints both tables."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, hub = Path(temporary), LocalHub()
        Image.new("RGB", (16, 16)).save(folder / "photo.png")
        hub.add("acceptee/DiT4SR", write_toy_release(folder / "release", legacy=True), "dit4sr_q/")
        hub.add(RELEASED_BASE, TOY_SD3)
        hub.thread.start()
        for run in ("first", "second"):
            received, seconds = restore(hub, folder, run)
            print(f"{run} run: {received:,} bytes of files, {seconds:.1f} s")
        kept = next((folder / "cache" / "dit4sr_pl").rglob("*.safetensors")).stat().st_size
        print(f"kept of the release: {kept:,} bytes")
        hub.shutdown()

    backbone = MetaBackbone(ASSETS / "published" / RELEASED_BASE, "bfloat16")
    net = backbone.network(DiT4SRTransformer)
    base, lr_stream = weights(net.base.state_dict()), weights(net.lr_stream.state_dict())
    sizes = {
        "a release": base + lr_stream + weights(dead_weights(net.base)),
        "of it is kept": lr_stream,
        "SD3.5-medium: transformer": base,
        "SD3.5-medium: autoencoder": weights(backbone.coder().vae.state_dict()),
    }
    for name, encoder in zip(("CLIP-L", "CLIP-G", "T5-XXL"), backbone.text_encoders(), strict=True):
        sizes[f"SD3.5-medium: {name}"] = weights(dict(encoder.named_parameters()))
    for name, size in sizes.items():
        print(f"{name:28}{size / 1e9:8.2f} GB{size / 2**30:8.2f} GiB")


if __name__ == "__main__":
    main()
