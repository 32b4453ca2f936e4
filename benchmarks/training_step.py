"""A training step and a forward pass against one forward pass of diffusers' own SD3 transformer, in one process.

    python benchmarks/training_step.py [--repeats 5] [--batch 2] [--profile]

8 blocks, width 512, 8 heads, second attention in blocks 0-3, 48x48 latents of 16 channels, 154 text tokens of 1024;
float32 on the CPU. A step is forward, squared error, backward to the LR stream, over a frozen base and without
checkpointing; the optimizer's step is not in it. Forward passes run without autograd. Both networks have the same
random base weights and take turns. `cpu` is processor time, which other programs on the machine disturb less.

`floor` is the ratio of operations in matrix products alone, attention's included: at equal efficiency nothing is
faster. The fused attention does not keep its softmax and computes the scores again in the backward pass: `recomputed`
counts that.
"""

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter, process_time

import torch
from diffusers import SD3Transformer2DModel
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
RUNS = ("diffusers", "forward", "step")


class Contest:
    """Both networks over one base, and one batch for them."""

    def __init__(self, batch: int, dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        self.base = SD3Transformer2DModel(**CONFIG)
        self.net = DiT4SRTransformer(self.base)
        for parameter in self.net.lr_stream.parameters():
            torch.nn.init.normal_(parameter, std=0.02)  # off the zero start: no product with zeros
        self.net.to(dtype)
        self.noisy_latent, self.lr_latent, self.target = torch.randn(3, batch, 16, 48, 48, dtype=dtype)
        self.timestep = torch.rand(batch) * 1000
        self.embeds = torch.randn(batch, TEXT_TOKENS, 1024, dtype=dtype)
        self.pooled = torch.randn(batch, 512, dtype=dtype)

    @torch.no_grad()
    def diffusers(self) -> None:
        self.base(self.noisy_latent, self.embeds, self.pooled, self.timestep)

    @torch.no_grad()
    def forward(self) -> None:
        self.velocity()

    def step(self) -> None:
        (self.velocity() - self.target).square().mean().backward()
        self.net.zero_grad()

    def velocity(self) -> Tensor:
        return self.net(self.noisy_latent, self.lr_latent, self.timestep, self.embeds, self.pooled)


def take_turns(contest: Contest, repeats: int, runs: tuple[str, ...]) -> dict[str, list[tuple[float, float]]]:
    """`(seconds, processor seconds)` of every run, after one of each to warm up."""
    times = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name in runs:
            start, cpu_start = perf_counter(), process_time()
            getattr(contest, name)()
            times[name].append((perf_counter() - start, process_time() - cpu_start))
    return {name: runs[1:] for name, runs in times.items()}


def products(run: Callable[[], None]) -> int:
    """Floating-point operations of a run's matrix products, softmax kept; the counter sees through plain attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    # It takes the depth-wise convolution's backward for a dense one's; that convolution is 0.1% of the whole.
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "convolution" not in str(op))


def attention_scores(blocks: int, tokens: int, batch: int) -> int:
    return 2 * blocks * batch * tokens**2 * CONFIG["num_attention_heads"] * CONFIG["attention_head_dim"]


def floors(batch: int) -> dict[str, tuple[float, float]]:
    """Products in units of those of diffusers' forward pass: with the softmax kept, and with the scores recomputed."""
    with torch.device("meta"):
        contest = Contest(batch)
        counts = {name: products(getattr(contest, name)) for name in RUNS}
    images = 2 * (CONFIG["sample_size"] // contest.net.patch_size) ** 2
    dual = len(CONFIG["dual_attention_layers"])
    again = attention_scores(CONFIG["num_layers"], images + TEXT_TOKENS, batch) + attention_scores(dual, images, batch)
    recomputed = counts | {"step": counts["step"] + again}
    return {name: (counts[name] / counts["diffusers"], recomputed[name] / counts["diffusers"]) for name in RUNS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="print where the time of one step goes")
    args = parser.parse_args()

    contest, floor = Contest(args.batch), floors(args.batch)
    times = take_turns(contest, args.repeats, RUNS)
    print(
        f"batch {args.batch}, {torch.get_num_threads()} threads, {args.repeats} repeats; ratios to diffusers' forward"
    )
    print(f"{'':10s}" + "".join(f"{head:>11s}" for head in ("median s", "min s", "cpu min s")), end="")
    print("".join(f"{head:>11s}" for head in ("median", "min", "cpu min", "floor", "recomputed")))
    summary = {name: summarise(runs) for name, runs in times.items()}
    for name, seconds in summary.items():
        ratios = [ours / theirs for ours, theirs in zip(seconds, summary["diffusers"], strict=True)]
        print(f"{name:10s}" + "".join(f"{s:11.3f}" for s in seconds), end="")
        print("".join(f"{ratio:11.2f}" for ratio in (*ratios, *floor[name])))

    if args.profile:
        with profile() as profiler:
            contest.step()
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


def summarise(runs: list[tuple[float, float]]) -> tuple[float, float, float]:
    seconds, cpu = zip(*runs, strict=True)
    return median(seconds), min(seconds), min(cpu)


if __name__ == "__main__":
    main()
