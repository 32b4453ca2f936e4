"""Bytes on disk per cached prompt: tensors, and what headers and index add to them.

    python benchmarks/embeddings_size.py

With embeddings of Stable Diffusion 3's and tiny-sd3's sizes, and captions of 400 characters.
"""

import tempfile
from pathlib import Path

import torch

from dit4sr_pl.preparation.embeddings import write_embeddings

SIZES = {"SD3, 77 T5 tokens": (154, 4096, 2048), "SD3, 256 T5 tokens": (333, 4096, 2048), "tiny-sd3": (16, 64, 64)}
CAPTION = "x" * 394


def main() -> None:
    """Prints the bytes per prompt of a cache at SD3.5-medium's size."""
    for name, (tokens, width, pooled) in SIZES.items():
        zeros = torch.zeros(1, tokens, width), torch.zeros(1, pooled)
        prompts = [f"{CAPTION}{i:06}" for i in range(199)]  # and the empty one
        with tempfile.TemporaryDirectory() as folder:
            write_embeddings(prompts, lambda prompt, zeros=zeros: zeros, folder, name, tokens, 256 * 10**6)
            measured = sum(path.stat().st_size for path in Path(folder).iterdir()) / 200
        tensors = 2 * (tokens * width + pooled)
        print(f"{name}: {tensors} bytes of tensors, {measured:.0f} measured; 20,000: {20_000 * measured / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
