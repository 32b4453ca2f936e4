"""Compares a forward pass of DiT4SR, merged as for restoring, with one of diffusers' SD3 transformer.

    [OMP_NUM_THREADS=2] python benchmarks/forward.py [--dtype float32] [--repeats 9]

Networks and batch are those of `training_step.py`, and both networks have the same base weights. They take turns,
without autograd. The column `products s` has the seconds that a pass spends in matrix products and attention, which no
implementation can do without.
"""

import argparse

import torch
from torch.profiler import profile
from training_step import Contest, summarise, take_turns

PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::_scaled_dot_product_flash_attention_for_cpu")


def main() -> None:
    """Prints the times of both networks and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()

    contest = Contest(2, getattr(torch, args.dtype))
    contest.net.lr_stream.merge(contest.base)
    times = take_turns(contest, args.repeats, ("diffusers", "forward"))
    theirs, ours = (summarise(runs) for runs in times.values())
    print(f"{args.dtype}, {torch.get_num_threads()} threads, {args.repeats} repeats, in turns")
    print(f"{'':10s}{'median s':>11s}{'min s':>11s}{'cpu min s':>11s}{'products s':>11s}")
    for name, seconds in (("diffusers", theirs), ("ours", ours)):
        products = in_products(contest, {"ours": "forward"}.get(name, name))
        print(f"{name:10s}" + "".join(f"{s:11.3f}" for s in (*seconds, products)))
    print(f"{'ratio':10s}" + "".join(f"{a / b:11.2f}" for a, b in zip(ours, theirs, strict=True)))


def in_products(contest: Contest, run: str) -> float:
    """Returns the seconds that one pass spends in matrix products and attention."""
    with profile() as profiler:
        getattr(contest, run)()
    return sum(event.self_cpu_time_total for event in profiler.key_averages() if event.key in PRODUCTS) / 1e6


if __name__ == "__main__":
    main()
