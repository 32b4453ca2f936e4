"""Compares a forward pass of DiT4SR, merged as for restoring, with the released form's and with diffusers' SD3's.

    [OMP_NUM_THREADS=2] python benchmarks/forward.py [--dtype float32] [--repeats 9]

Networks and batch are those of `training_step.py`; all have the same base weights. They take turns, without autograd.
The released form has two matrices per LR projection, one after the other on every token. The column `products s` has
the seconds that a pass spends in matrix products and attention, which no implementation can do without.
"""

import argparse

import torch
from gpu_models import two_matrices
from torch.profiler import profile
from training_step import Contest, summarise, take_turns

from dit4sr_pl.model import DiT4SRTransformer

PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::_scaled_dot_product_flash_attention_for_cpu")


def main() -> None:
    """Prints the times of both networks and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()

    contest = Forward(2, getattr(torch, args.dtype))
    times = take_turns(contest, args.repeats, ("diffusers", "as_released", "forward"))
    theirs, released, ours = (summarise(runs) for runs in times.values())
    print(f"{args.dtype}, {torch.get_num_threads()} threads, {args.repeats} repeats, in turns")
    print(f"{'':10s}{'median s':>11s}{'min s':>11s}{'cpu min s':>11s}{'products s':>11s}")
    for name, run, seconds in (
        ("diffusers", "diffusers", theirs),
        ("released", "as_released", released),
        ("ours", "forward", ours),
    ):
        products = in_products(contest, run)
        print(f"{name:10s}" + "".join(f"{s:11.3f}" for s in (*seconds, products)))
    for name, others in (("to diffusers", theirs), ("to released", released)):
        print(f"{name:12s}" + "".join(f"{a / b:9.2f}" for a, b in zip(ours, others, strict=True)))


class Forward(Contest):
    """The contest with a merged network and, next to it, one in the released form."""

    def __init__(self, batch: int, dtype: torch.dtype):
        super().__init__(batch, dtype)
        self.merged, self.unmerged = self.net, DiT4SRTransformer(self.base).to(dtype)
        self.unmerged.lr_stream.load_state_dict(self.net.lr_stream.state_dict())
        self.merged.lr_stream.merge(self.base)

    def as_released(self) -> None:
        """Runs the released form without autograd."""
        self.net = self.unmerged
        with two_matrices():
            self.forward()
        self.net = self.merged


def in_products(contest: Contest, run: str) -> float:
    """Returns the seconds that one pass spends in matrix products and attention."""
    with profile() as profiler:
        getattr(contest, run)()
    return sum(event.self_cpu_time_total for event in profiler.key_averages() if event.key in PRODUCTS) / 1e6


if __name__ == "__main__":
    main()
