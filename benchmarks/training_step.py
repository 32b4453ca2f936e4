"""Compares a training step and a forward pass with one forward pass of diffusers' SD3 transformer, in one process.

    python benchmarks/training_step.py [--repeats 5] [--batch 2] [--profile]

The networks have 8 blocks, width 512, 8 heads and a second attention in blocks 0-3. They get 48x48 latents of 16
channels and 154 text tokens of width 1024, in float32 on the CPU. A step is a forward pass, a squared error and a
backward pass to the LR stream over a frozen base, without gradient checkpointing and without the optimizer's step. The
forward passes run without autograd. Both networks have the same random base weights and take turns. `released` is a
step with two matrices per LR projection, one after the other on every token, as the authors' code has them. `cpu` is
processor time, which other programs on the machine disturb less.

`bound` is the ratio of operations in matrix products, including attention's: at equal efficiency no step takes less.
The fused attention does not keep its softmax and computes the scores again in the backward pass, which `recomputed`
includes.
"""

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter, process_time

import torch
from diffusers import SD3Transformer2DModel
from gpu_models import two_matrices
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from dit4sr_pl.model import DiT4SRTransformer

CONFIG = dict(
    sample_size=48,
    in_channels=16,
    out_channels=16,
    num_layers=8,
    attention_head_dim=64,
    num_attention_heads=8,
    joint_attention_dim=1024,
    caption_projection_dim=512,
    pooled_projection_dim=512,
    pos_embed_max_size=48,
    dual_attention_layers=(0, 1, 2, 3),
    qk_norm="rms_norm",
)
TEXT_TOKENS = 154
RUNS = ("diffusers", "forward", "released", "step")


class Contest:
    """Both networks over one base, and one batch for them.

    Args:
        batch: number of latents.
        dtype: dtype of weights and batch.
    """

    def __init__(self, batch: int, dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        self.base = SD3Transformer2DModel(**CONFIG)
        self.net = DiT4SRTransformer(self.base)
        for parameter in self.net.lr_stream.parameters():
            torch.nn.init.normal_(parameter, std=0.02)  # no products with the zeros of the start
        self.net.to(dtype)
        self.noisy_latent, self.lr_latent, self.target = torch.randn(3, batch, 16, 48, 48, dtype=dtype)
        self.timestep = torch.rand(batch) * 1000
        self.embeds = torch.randn(batch, TEXT_TOKENS, 1024, dtype=dtype)
        self.pooled = torch.randn(batch, 512, dtype=dtype)

    @torch.no_grad()
    def diffusers(self) -> None:
        """Runs diffusers' transformer."""
        self.base(self.noisy_latent, self.embeds, self.pooled, self.timestep)

    @torch.no_grad()
    def forward(self) -> None:
        """Runs DiT4SR without autograd."""
        self.velocity()

    def step(self) -> None:
        """Runs a training step without the optimizer's."""
        (self.velocity() - self.target).square().mean().backward()
        self.net.zero_grad()

    def released(self) -> None:
        """Runs a training step with two matrices per LR projection."""
        with two_matrices():
            self.step()

    def velocity(self) -> Tensor:
        """Returns DiT4SR's output for the batch."""
        return self.net(self.noisy_latent, self.lr_latent, self.timestep, self.embeds, self.pooled)


def take_turns(contest: Contest, repeats: int, runs: tuple[str, ...]) -> dict[str, list[tuple[float, float]]]:
    """Returns `(seconds, processor seconds)` of every run, after one of each to warm up."""
    times = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name in runs:
            start, cpu_start = perf_counter(), process_time()
            getattr(contest, name)()
            times[name].append((perf_counter() - start, process_time() - cpu_start))
    return {name: runs[1:] for name, runs in times.items()}


def products(run: Callable[[], None]) -> int:
    """Returns the floating-point operations of a run's matrix products, with attention that keeps its softmax."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    # The counter takes the depth-wise convolution's backward pass for a dense one's; that convolution is 0.1% of all.
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "convolution" not in str(op))


def attention_scores(blocks: int, tokens: int, batch: int) -> int:
    """Returns the floating-point operations of the attention scores of all blocks."""
    return 2 * blocks * batch * tokens**2 * CONFIG["num_attention_heads"] * CONFIG["attention_head_dim"]


def bounds(batch: int) -> dict[str, tuple[float, float]]:
    """Returns every run's operations over diffusers' forward pass's: with the softmax kept, and scores recomputed."""
    with torch.device("meta"):
        contest = Contest(batch)
        counts = {name: products(getattr(contest, name)) for name in RUNS}
    images = 2 * (CONFIG["sample_size"] // contest.net.patch_size) ** 2
    dual = len(CONFIG["dual_attention_layers"])
    again = attention_scores(CONFIG["num_layers"], images + TEXT_TOKENS, batch) + attention_scores(dual, images, batch)
    recomputed = counts | {name: counts[name] + again for name in ("released", "step")}
    return {name: (counts[name] / counts["diffusers"], recomputed[name] / counts["diffusers"]) for name in RUNS}


def main() -> None:
    """Prints the times of all runs and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="print where the time of one step goes")
    args = parser.parse_args()

    contest, bound = Contest(args.batch), bounds(args.batch)
    times = take_turns(contest, args.repeats, RUNS)
    print(
        f"batch {args.batch}, {torch.get_num_threads()} threads, {args.repeats} repeats; ratios to diffusers' forward"
    )
    print(f"{'':10s}" + "".join(f"{head:>11s}" for head in ("median s", "min s", "cpu min s")), end="")
    print("".join(f"{head:>11s}" for head in ("median", "min", "cpu min", "bound", "recomputed")))
    summary = {name: summarise(runs) for name, runs in times.items()}
    for name, seconds in summary.items():
        ratios = [ours / theirs for ours, theirs in zip(seconds, summary["diffusers"], strict=True)]
        print(f"{name:10s}" + "".join(f"{s:11.3f}" for s in seconds), end="")
        print("".join(f"{ratio:11.2f}" for ratio in (*ratios, *bound[name])))

    print(
        "step / released: "
        + " ".join(f"{a / b:.2f}" for a, b in zip(summary["step"], summary["released"], strict=True))
    )
    if args.profile:
        with profile() as profiler:
            contest.step()
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


def summarise(runs: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Returns median and smallest seconds and smallest processor seconds."""
    seconds, cpu = zip(*runs, strict=True)
    return median(seconds), min(seconds), min(cpu)


if __name__ == "__main__":
    main()
