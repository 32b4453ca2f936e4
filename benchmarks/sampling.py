"""Measures what makes sampling cheaper without training: scores, operations and seconds of tiny-dit4sr per option.

    python benchmarks/sampling.py refresh|guidance|tiles|steps [--crops 1] [--steps 20]

The images are crops of the held-out photos, as in `tiny.py`: 128x128, for `tiles` 512x512. The first row is the full
result; the others are relative to it, in ST-LPIPS, operations of the network and seconds (one image after another, all
of it). `to the full` is the root mean square difference from its image, from the same noise, in levels of 255.

`steps` places the same number of steps in several ways through `sampler.sigmas`. `where it bends` are the sigmas that
part the integral of the square root of |dv/dsigma| evenly, measured on trajectories of 100 steps over the first crops.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.progress import track
from tiny import CROP, photos, psnr
from torch import Tensor

from dit4sr_pl.cli.command import conf_folder, read_conf
from dit4sr_pl.common.files import ASSETS
from dit4sr_pl.common.markdown import markdown_table
from dit4sr_pl.common.randomness import derive_seed
from dit4sr_pl.model import DiT4SRTransformer
from dit4sr_pl.planning.meta_backbone import MetaBackbone
from dit4sr_pl.planning.restoring_cost import restoring_cost
from dit4sr_pl.restoration.restorer import Restorer
from dit4sr_pl.restoration.sampler import Sampler
from dit4sr_pl.scores.pyiqa_loading import create

HEADS = ("option", "evaluations", "operations", "ST-LPIPS", "relative", "PSNR", "to the full", "seconds")
PROBED = 2  # photos whose trajectories `steps` probes
TILED = 512  # pixels; four tiles of tiny-dit4sr's side by side, nine that overlap
SHIFTS = (1, 3, 5)  # of placements in `steps`: evenly spaced from 1 to 0, shifted as SD3 shifts
BENT = "where it bends"  # the placement that equalises Euler's errors on the teacher's own trajectories
NEGATIVE = "motion blur, noisy, lowres"
SECTIONS = {
    "refresh": {
        "full": [],
        **{f"lr_refresh={n}": [f"sampler.lr_refresh={n}"] for n in (2, 3, 4, 5, 10, 20)},
        "dpm, 10 steps": ["sampler/solver=dpm", "sampler.steps=10"],
        "dpm, 10 steps, lr_refresh=2": ["sampler/solver=dpm", "sampler.steps=10", "sampler.lr_refresh=2"],
        "dpm, 10 steps, lr_refresh=5": ["sampler/solver=dpm", "sampler.steps=10", "sampler.lr_refresh=5"],
    },
    "guidance": {
        "full": [],
        **{
            f"sigma {low}..{high}": [f"sampler.guidance_sigma_min={low}", f"sampler.guidance_sigma_max={high}"]
            for low, high in ((0.3, 1), (0.6, 1), (0, 0.9), (0.3, 0.9), (1, 1))
        },
        "lr_shared": ["sampler.lr_shared=true"],
        "lr_shared, lr_refresh=4": ["sampler.lr_shared=true", "sampler.lr_refresh=4"],
        "lr_refresh=4": ["sampler.lr_refresh=4"],
        "lr_shared, lr_refresh=4, sigma 0.3..0.9": [
            *("sampler.lr_shared=true", "sampler.lr_refresh=4"),
            *("sampler.guidance_sigma_min=0.3", "sampler.guidance_sigma_max=0.9"),
        ],
    },
    "tiles": {
        "overlap=12": [],
        "overlap=0": ["sampler.overlap=0"],
        "shifted": ["sampler.tiling=shifted"],
        "shifted, lr_refresh=2": ["sampler.tiling=shifted", "sampler.lr_refresh=2"],
        "overlap=12, lr_refresh=4": ["sampler.lr_refresh=4"],
        "in one piece": ["sampler.tile=64"],
    },
    "steps": {
        "solution, 40 steps of dpm": ["sampler/solver=dpm", "sampler.steps=40"],
        **{
            f"{solver}, {placement}, {steps}": [f"sampler/solver={solver}", f"sampler.steps={steps}"]
            for steps in (5, 10)
            for solver in ("euler", "dpm")
            for placement in ("its own", *(f"shift={shift}" for shift in SHIFTS), BENT)
            if (solver, placement) != ("dpm", "shift=3")  # its own
        },
    },
}


def main() -> None:
    """Runs a section and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--crops", type=int, default=1, help="at most, per photo")
    parser.add_argument("--photos", type=int, help="at most; None: all that are large enough")
    parser.add_argument("--skip", type=int, default=0, help="photos to leave out before")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=2, help="of guidance, in `guidance`")
    parser.add_argument("--only", default="", help="rows with this text in their names, next to the first")
    args = parser.parse_args()

    size = TILED if args.section == "tiles" else CROP
    common = [f"sampler.steps={args.steps}"]
    if args.section == "guidance":
        common += [f"sampler.guidance_scale={args.scale}", f"sampler.negative_prompt='{NEGATIVE}'"]
    samplers = {name: sampler_of([*common, *options]) for name, options in SECTIONS[args.section].items()}
    first, *others = samplers
    samplers = {name: samplers[name] for name in (first, *(name for name in others if args.only in name))}
    crops = list(photos(args.crops, size))[args.skip :][: args.photos]
    restorer = load(samplers[first])
    if args.section == "steps":
        bend = bending(restorer, crops[:PROBED])
        samplers = {name: placed(name, sampler, bend) for name, sampler in samplers.items()}
    restorers = {name: Restorer(restorer.net, restorer.backbone, sampler) for name, sampler in samplers.items()}
    report(samplers, measured(restorers, crops), size)


def sampler_of(overrides: list[str]) -> Sampler:
    """Returns tiny-dit4sr's sampler with overrides."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return instantiate(compose("train", ["output=unused", *overrides]).sampler)


def load(sampler: Sampler) -> Restorer:
    """Returns tiny-dit4sr with a sampler."""
    backbone = instantiate(read_conf("restore", "input=unused").model.backbone)
    return Restorer.load(backbone, sampler, "tiny-dit4sr", torch.device("cpu"))


def placed(name: str, sampler: Sampler, bend: Tensor) -> Sampler:
    """Returns a sampler of the section `steps` with the sigmas that its row's name says, which are printed.

    Args:
        name: the row's name.
        sampler: solver and number of steps.
        bend: see `bending`.
    """
    solver, _, placement = name.partition(", ")
    placement, _, steps = placement.rpartition(", ")
    if placement == BENT:
        place = torch.linspace(0, 1, sampler.steps + 1)[:-1]
        sigmas = 1 - torch.searchsorted(bend, place).clamp(max=len(bend) - 1) / len(bend)
    elif placement.startswith("shift="):
        shift, even = float(placement.removeprefix("shift=")), 1 - torch.arange(sampler.steps) / sampler.steps
        sigmas = shift * even / (1 + (shift - 1) * even)
    else:
        return sampler
    if solver == "euler":
        print(f"{placement}, {steps}: {[round(sigma, 3) for sigma in sigmas.tolist()]}")
    return replace(sampler, sigmas=sigmas.tolist())


def bending(restorer: Restorer, crops: list[tuple[str, Tensor]], steps: int = 100) -> Tensor:
    """Returns the share of all bending that a trajectory has behind it at even steps from sigma 1 to 0, `(steps,)`."""
    velocities, even = [], (1 - torch.arange(steps) / steps).tolist()
    euler = sampler_of([f"sampler.sigmas={even}"])
    probing = Restorer(restorer.net, restorer.backbone, euler)
    hook = restorer.net.register_forward_hook(lambda net, inputs, velocity: velocities.append(velocity))
    degradation, total = instantiate(read_conf("train", "output=unused").degradation), torch.zeros(steps)
    for photo, hr in track(crops, description="bending"):
        velocities.clear()
        size = tuple(hr.shape[-2:])
        lr, _ = degradation(hr, degradation.draw([derive_seed(photo, i) for i in range(len(hr))], size))
        probing(lr, size, [""] * len(hr), [f"{photo}{i}" for i in range(len(hr))], 0)
        changes = [(b - a).square().mean().sqrt() for a, b in pairwise(velocities)]
        total += torch.stack([*changes, changes[-1]]).sqrt()
    hook.remove()
    return (total.cumsum(0) - total) / total.sum()


def measured(restorers: dict[str, Restorer], crops: list[tuple[str, Tensor]]) -> list[list[float]]:
    """Returns ST-LPIPS, PSNR, distance to the first restorer's image and seconds per image of every restorer, means
    over photos. On every photo they take turns.

    Args:
        restorers: restorers by name.
        crops: names of photos and their crops, `(B, 3, S, S)` in 0..1.
    """
    degradation, stlpips = instantiate(read_conf("train", "output=unused").degradation), create("stlpips")
    scores = [
        list(scores_of(restorers.values(), photo, hr, degradation, stlpips))
        for photo, hr in track(crops, description="photos")
    ]
    return torch.tensor(scores).mean(dim=0).tolist()


def scores_of(restorers, photo, hr, degradation, stlpips) -> Iterator[list[float]]:
    """Yields the scores of every restorer on the crops of one photo."""
    size, full = tuple(hr.shape[-2:]), None
    lr, _ = degradation(hr, degradation.draw([derive_seed(photo, i) for i in range(len(hr))], size))
    for restorer in restorers:
        start = time.perf_counter()
        sr = restorer(lr, size, [""] * len(hr), [f"{photo}{i}" for i in range(len(hr))], 0)
        seconds = (time.perf_counter() - start) / len(hr)
        full = sr if full is None else full
        distance = 255 * (sr - full).square().mean(dim=(1, 2, 3)).sqrt().mean()
        yield [stlpips(sr, hr).mean().item(), psnr(sr, hr), distance.item(), seconds]


def operations(sampler: Sampler, size: int) -> tuple[int, int]:
    """Returns the network's evaluations and FLOPs of one image."""
    backbone = MetaBackbone(ASSETS / "tiny-sd3", "float32")
    cost = restoring_cost(backbone, backbone.network(DiT4SRTransformer), sampler, size)
    return cost.evaluations, cost.sampling_flops


def report(samplers: dict[str, Sampler], scores: list[list[float]], size: int) -> None:
    """Prints the rows as a Markdown table; operations, one column of ST-LPIPS and seconds are relative to the first."""
    counts = [operations(sampler, size) for sampler in samplers.values()]
    (_, flops), (base, _, _, seconds) = counts[0], scores[0]
    rows = [
        (name, str(evaluations), f"{count / flops:.2f}", f"{stlpips:.4f}", f"{stlpips / base:.3f}", f"{db:.2f}")
        + (f"{distance:.2f}", f"{taken / seconds:.2f}")
        for name, (evaluations, count), (stlpips, db, distance, taken) in zip(samplers, counts, scores, strict=True)
    ]
    print(markdown_table(HEADS, rows))
    print(f"\n{seconds:.2f} s per image of the first row")


if __name__ == "__main__":
    main()
