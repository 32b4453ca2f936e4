"""Scores tiny-dit4sr by the number of network evaluations, for every solver in `conf/sampler/solver/`.

    python benchmarks/solvers.py [--crops 2] [--evaluations 5 10 20 40] [--figure docs/solvers.png]

The images are 128x128 crops of the held-out photos, as in `tiny.py`. `to the solution` is the root mean square
difference to the image that 200 Euler steps give from the same noise, in levels of 255: it shows how far a solver is
from convergence. Heun gets as many steps as fit into the evaluations; only Euler gets the last number of evaluations.
"""

import argparse
from dataclasses import replace

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.progress import track
from tiny import CROP, photos, psnr

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.markdown import markdown_table
from dit4sr_pl.common.randomness import derive_seed
from dit4sr_pl.restoration.restorer import Restorer
from dit4sr_pl.restoration.sampler import Sampler
from dit4sr_pl.scores.pyiqa_loading import create

SOLUTION = ("euler", 200)
HEADS = ("solver", "evaluations", "ST-LPIPS", "PSNR", "to the solution")


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=2, help="at most, per photo")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[5, 10, 20, 40])
    parser.add_argument("--figure")
    args = parser.parse_args()

    names = sorted(path.stem for path in (conf_folder() / "sampler" / "solver").glob("*.yaml"))
    counts = {name: args.evaluations if name == "euler" else args.evaluations[:-1] for name in names}
    samplers = {(name, n): at_most(n, name) for name in names for n in counts[name]} | {SOLUTION: at_most(200)}
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("train", ["output=unused"])
    degradation, stlpips = instantiate(cfg.degradation), create("stlpips")
    restorer = Restorer.load(instantiate(cfg.model.backbone), samplers[SOLUTION], "tiny-dit4sr", torch.device("cpu"))

    scores = []
    for photo, hr in track(list(photos(args.crops)), description="photos"):
        lr, _ = degradation(hr, degradation.draw([derive_seed(photo, i) for i in range(len(hr))], (CROP, CROP)))
        images = {}
        for key, restorer.sampler in samplers.items():
            images[key] = restorer(lr, (CROP, CROP), [""] * len(hr), [f"{photo}{i}" for i in range(len(hr))], 0)
        solution = images[SOLUTION]
        distances = {
            key: 255 * (sr - solution).square().mean(dim=(1, 2, 3)).sqrt().mean() for key, sr in images.items()
        }
        scores.append([[stlpips(sr, hr).mean(), psnr(sr, hr), distances[key]] for key, sr in images.items()])

    rows = [
        (name, len(sampler.schedule(restorer.backbone.scheduler)[1]), *means)
        for ((name, _), sampler), means in zip(samplers.items(), torch.tensor(scores).mean(dim=0).tolist(), strict=True)
    ]
    report(rows)
    if args.figure:
        draw(rows, args.figure)


def at_most(evaluations: int, solver: str = "euler") -> Sampler:
    """Returns tiny-dit4sr's sampler with the most steps of a solver that these network evaluations allow."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        sampler = instantiate(compose("train", ["output=unused", f"sampler/solver={solver}"]).sampler)
    return replace(sampler, steps=(evaluations + 1) // 2 if solver == "heun" else evaluations)


def report(rows: list[tuple]) -> None:
    """Prints the rows as a Markdown table."""
    texts = [
        (name, str(n), f"{stlpips:.4f}", f"{db:.2f}", f"{distance:.2f}") for name, n, stlpips, db, distance in rows
    ]
    print(markdown_table(HEADS, texts))


def draw(rows: list[tuple], path: str) -> None:
    """Writes a chart of the rows: a panel per score, a line per solver."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3), layout="constrained")
    for column, (axis, head) in enumerate(zip(axes, HEADS[2:], strict=True), start=2):
        for name in dict.fromkeys(row[0] for row in rows):
            points = [(row[1], row[column]) for row in rows if row[0] == name and row[1] < SOLUTION[1]]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axis.set(xlabel="network evaluations", title=head, xscale="log")
        axis.set_xticks([row[1] for row in rows if row[0] == "euler"][:-1])
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.minorticks_off()
    axes[2].set_yscale("log")
    axes[0].legend()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
