"""Measures what makes sampling cheaper without training: scores, operations and seconds of tiny-dit4sr per option.

    python benchmarks/sampling.py refresh|guidance|tiles|steps [--crops 1] [--steps 20]

The images are crops of the held-out photos, as in `tiny.py`: 128x128, for `tiles` 512x512. The first row is the full
result; the others are relative to it, in ST-LPIPS, operations of the network and seconds (one image after another, all
of it). `to the full` is the root mean square difference from its image, from the same noise, in levels of 255.
"""

import argparse
import time
from collections.abc import Iterator

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.progress import track
from tiny import CROP, photos, psnr
from torch import Tensor

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.files import ASSETS
from dit4sr_pl.common.markdown import markdown_table
from dit4sr_pl.common.randomness import derive_seed
from dit4sr_pl.model import DiT4SRTransformer
from dit4sr_pl.planning.meta_backbone import MetaBackbone
from dit4sr_pl.planning.restoring_cost import restoring_cost
from dit4sr_pl.restoration.restorer import Restorer
from dit4sr_pl.restoration.sampling import Sampler
from dit4sr_pl.scores.pyiqa_loading import create

HEADS = ("option", "evaluations", "operations", "ST-LPIPS", "relative", "PSNR", "to the full", "seconds")
TILED = 512  # pixels; four tiles of tiny-dit4sr's side by side, nine that overlap
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
        "solution, 200 Euler steps": ["sampler.steps=200"],
        **{
            f"{name}, {steps}": [f"sampler.steps={steps}", *options]
            for steps in (10, 20)
            for name, options in {
                "shift=3, the base's": [],
                "shift=1": ["+sampler.solver.shift=1"],
                "shift=2": ["+sampler.solver.shift=2"],
                "shift=5": ["+sampler.solver.shift=5"],
                "Karras": ["+sampler.solver.use_karras_sigmas=true"],
                "exponential": ["+sampler.solver.use_exponential_sigmas=true"],
                "beta": ["+sampler.solver.use_beta_sigmas=true"],
                "dpm": ["sampler/solver=dpm"],
                "dpm, shift=2": ["sampler/solver=dpm", "+sampler.solver.flow_shift=2"],
                "dpm, shift=5": ["sampler/solver=dpm", "+sampler.solver.flow_shift=5"],
            }.items()
        },
    },
}


def main() -> None:
    """Runs a section and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--crops", type=int, default=1, help="at most, per photo")
    parser.add_argument("--photos", type=int, help="at most; None: all that are large enough")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=2, help="of guidance, in `guidance`")
    args = parser.parse_args()

    size = TILED if args.section == "tiles" else CROP
    common = [f"sampler.steps={args.steps}"]
    if args.section == "guidance":
        common += [f"sampler.guidance_scale={args.scale}", f"sampler.negative_prompt='{NEGATIVE}'"]
    samplers = {name: sampler_of([*common, *options]) for name, options in SECTIONS[args.section].items()}
    crops = [(photo, hr) for photo, hr in photos(args.crops, size) if len(hr)][: args.photos]
    report(samplers, measured(samplers, crops), size)


def sampler_of(overrides: list[str]) -> Sampler:
    """Returns tiny-dit4sr's sampler with overrides."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return instantiate(compose("train", ["output=unused", *overrides]).sampler)


def measured(samplers: dict[str, Sampler], crops: list[tuple[str, Tensor]]) -> list[list[float]]:
    """Returns ST-LPIPS, PSNR, distance to the first sampler's image and seconds per image of every sampler, means over
    photos.

    Args:
        samplers: samplers by name.
        crops: names of photos and their crops, `(B, 3, S, S)` in 0..1.
    """
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("train", ["output=unused"])
    degradation, stlpips = instantiate(cfg.degradation), create("stlpips")
    first = next(iter(samplers.values()))
    restorer = Restorer.load(instantiate(cfg.model.backbone), first, "tiny-dit4sr", torch.device("cpu"))
    scores = [
        list(scores_of(samplers, restorer, photo, hr, degradation, stlpips))
        for photo, hr in track(crops, description="photos")
    ]
    return torch.tensor(scores).mean(dim=0).tolist()


def scores_of(samplers, restorer, photo, hr, degradation, stlpips) -> Iterator[list[float]]:
    """Yields the scores of every sampler on the crops of one photo."""
    size, full = tuple(hr.shape[-2:]), None
    lr, _ = degradation(hr, degradation.draw([derive_seed(photo, i) for i in range(len(hr))], size))
    for restorer.sampler in samplers.values():
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
