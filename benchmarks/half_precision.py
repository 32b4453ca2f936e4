"""Distance of a released network in half precision to the reference's output in float32, on the golden `q_dual`.

    python benchmarks/half_precision.py

Each row is a way in which a release may be stored. The network runs in the frozen weights' dtype, then in float32,
which leaves the rounding of the stored weights alone. Distances are the largest difference and the root mean square,
relative to the standard deviation of the reference's output.
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from dit4sr_pl.model import DiT4SRTransformer
from testing.releases import GOLDEN, write_release

STORED = {
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "float16, LR stream float32": (torch.float16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
}


@torch.no_grad()
def main() -> None:
    """Prints the table."""
    tensors = load_file(GOLDEN / "q_dual" / "io.safetensors")
    expected = tensors.pop("output")
    print(f"{'stored':30}{'runs in':10}{'largest':>12}{'rms':>12}")
    with tempfile.TemporaryDirectory() as folder:
        for stored, (frozen, control) in STORED.items():
            release = write_release(Path(folder) / stored, frozen=frozen, control=control, zero_keys=True)
            for dtype in dict.fromkeys((frozen, torch.float32)):
                difference = DiT4SRTransformer.from_reference(release, dtype=dtype)(**tensors).float() - expected
                distance = difference / expected.std()
                largest, rms = distance.abs().max().item(), distance.square().mean().sqrt().item()
                print(f"{stored:30}{str(dtype).removeprefix('torch.'):10}{largest:12.2e}{rms:12.2e}")


if __name__ == "__main__":
    main()
