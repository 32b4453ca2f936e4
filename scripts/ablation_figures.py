"""Draws what `make ablation` has trained: curves of the scores over training steps, and the same crops side by side.

    python scripts/ablation_figures.py outputs/ablation

A run's TensorBoard log has a picture LR | bicubic | restored | ground truth of every held-out crop after every
validation; everything here is measured on those. `curves.png` and `crops.jpg` are written into `--output`. The tables
that are printed have at every step ST-LPIPS as a ratio to bicubic's, of photos and of text apart: the mean over crops
and seeds, and in brackets the lowest and the highest seed. The last table has the difference to bicubic after the last
step, crop by crop: its mean over crops and seeds, with a 95% bootstrap interval over crops.
"""

import argparse
import io
import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from dit4sr_pl.common.files import atomic_write
from dit4sr_pl.common.markdown import markdown_table
from dit4sr_pl.comparison.rows import variant_label
from dit4sr_pl.comparison.statistics import Resampling
from dit4sr_pl.data.demo_photos import WRITING
from dit4sr_pl.scores.pyiqa_loading import create

VARIANTS = ("full", "no_lr_integration", "no_lr_residual", "no_lr_injection", "linear_lr_injection", "sd3_controlnet")
SHOWN = ("astronaut_1", "china_2", "page_0", "text_1")  # the crops of the picture
PARTS = ("photos", "text")
TAG = "val/"  # of the pictures, followed by the crop's name

Strips = dict[tuple[int, str], np.ndarray]  # by step and crop: LR, bicubic, restored and true image, uint8 (4, H, W, 3)
Scores = dict[int, dict[str, np.ndarray]]  # by step and crop: ST-LPIPS of restored and bicubic image (2)
Curve = dict[str, dict[int, list[float]]]  # by part and step: the ratio of every seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the runs, VARIANT/seedK")
    parser.add_argument("--output", type=Path, help="folder for curves.png and crops.jpg; default: FOLDER/compare")
    args = parser.parse_args()
    output = args.output or args.folder / "compare"

    score, scores, columns = create("stlpips"), {}, {}
    for variant in VARIANTS:
        runs = [strips for path in sorted((args.folder / variant).glob("seed*")) if (strips := strips_of(path))]
        if runs:
            scores[variant], columns[variant] = [scores_of(run, score) for run in runs], last_strips(runs[0])
    if not scores:
        raise SystemExit(f"{args.folder}: no run with a validation; run `make ablation` first")
    curves = {variant: curve_of(runs) for variant, runs in scores.items()}
    for part in PARTS:
        print(table(curves, part) + "\n")
    print(differences(scores))
    for name, figure in (("curves.png", chart(curves)), ("crops.jpg", side_by_side(columns))):
        with atomic_write(output / name) as partial:
            figure.savefig(partial, format=name.rpartition(".")[2], dpi=150)


def label(name: str) -> str:
    """Returns the label of a variant or of the baseline, as `compare` has it."""
    return "SD3-ControlNet" if name == "sd3_controlnet" else variant_label(name)


def strips_of(run: Path) -> Strips:
    """Returns the pictures of all validations of a run."""
    log = EventAccumulator(str(run), size_guidance={"images": 0})
    log.Reload()
    strips = {}
    for tag in (tag for tag in log.Tags()["images"] if tag.startswith(TAG)):
        for event in log.Images(tag):
            strip = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
            strips[event.step + 1, tag.removeprefix(TAG)] = np.stack(np.split(strip, 4, axis=1))
    return strips


def last_strips(strips: Strips) -> dict[str, np.ndarray]:
    """Returns the pictures of a run's last validation by crop."""
    last = max(step for step, _ in strips)
    return {name: strip for (step, name), strip in strips.items() if step == last}


def scores_of(strips: Strips, score: nn.Module) -> Scores:
    """Returns the ST-LPIPS of a run's pictures and of bicubic enlargement."""
    scores = defaultdict(dict)
    for (step, name), strip in strips.items():
        _, bicubic, restored, truth = torch.tensor(strip).permute(0, 3, 1, 2) / 255
        both = score(torch.stack([restored, bicubic]), torch.stack([truth, truth]))
        scores[step][name] = both.flatten().numpy()
    return scores


def in_part(crops: dict[str, np.ndarray], part: str) -> list[np.ndarray]:
    """Returns the scores of the crops of a part, in the order of their names."""
    return [crops[name] for name in sorted(crops) if part == "all" or (part == "text") == name.startswith(WRITING)]


def curve_of(runs: list[Scores]) -> Curve:
    """Returns a variant's ST-LPIPS, as a mean over crops, divided by bicubic's."""
    curve = {part: defaultdict(list) for part in PARTS}
    for scores in runs:
        for part, (step, crops) in itertools.product(PARTS, scores.items()):
            restored, bicubic = np.mean(in_part(crops, part), axis=0)
            curve[part][step].append(restored / bicubic)
    return curve


def differences(variants: dict[str, list[Scores]]) -> str:
    """Returns a Markdown table of the differences to bicubic after every run's last step, which brackets follow."""
    resampling = Resampling(level=0.95, resamples=10_000, seed=0)
    rows = []
    for name, runs in variants.items():
        cells = [label(name)]
        for part in ("all", *PARTS):
            seeds = np.array([in_part(scores[max(scores)], part) for scores in runs])  # (seeds, crops, 2)
            difference = (seeds[..., 0] - seeds[..., 1]).mean(axis=0)
            low, high = resampling.interval(difference[:, None])
            cells.append(f"{difference.mean():+.4f} [{low[0]:.4f}, {high[0]:.4f}]")
        rows.append(cells)
    return markdown_table(["difference to bicubic", "all crops", *PARTS], rows)


def table(curves: dict[str, Curve], part: str) -> str:
    """Returns the curves of a part as a Markdown table with a column per step."""
    steps = sorted({step for curve in curves.values() for step in curve[part]})
    rows = [[label(name), *(cell(curve[part].get(step, [])) for step in steps)] for name, curve in curves.items()]
    return markdown_table([part, *(f"step {step}" for step in steps)], rows)


def cell(seeds: list[float]) -> str:
    """Returns the mean of the seeds, and the lowest and the highest of several; nothing without seeds."""
    if not seeds:
        return ""
    spread = f" [{min(seeds):.3f}, {max(seeds):.3f}]" if len(seeds) > 1 else ""
    return f"{np.mean(seeds):.3f}{spread}"


def chart(curves: dict[str, Curve]) -> Figure:
    """Returns a panel per part with a line per variant through its means, and the seeds' spread as an area."""
    figure = Figure((9, 3.6), layout="constrained")
    panels = figure.subplots(1, len(PARTS))
    for panel, part in zip(panels, PARTS, strict=True):
        for name, curve in curves.items():
            steps = sorted(curve[part])
            seeds = [curve[part][step] for step in steps]
            (line,) = panel.plot(steps, list(map(np.mean, seeds)), marker="o", label=label(name))
            panel.fill_between(steps, list(map(min, seeds)), list(map(max, seeds)), color=line.get_color(), alpha=0.15)
        panel.axhline(1, color="grey", linestyle=":", label="bicubic")
        panel.set_title(part)
        panel.set_xlabel("training step")
    panels[0].set_ylabel("ST-LPIPS, ratio to bicubic's")
    panels[-1].legend(fontsize="small")
    return figure


def side_by_side(columns: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Returns a row per crop: LR, bicubic, every variant's result and the ground truth, each 1.7 inches wide."""
    titles = ["LR", "bicubic", *map(label, columns), "ground truth"]
    figure = Figure((1.7 * len(titles), 1.75 * len(SHOWN)), layout="constrained")
    for row, name in zip(figure.subplots(len(SHOWN), len(titles)), SHOWN, strict=True):
        low, bicubic, _, truth = next(iter(columns.values()))[name]
        restored = [strips[name][2] for strips in columns.values()]
        for panel, picture, title in zip(row, (low, bicubic, *restored, truth), titles, strict=True):
            panel.imshow(picture, interpolation="nearest")
            panel.set_axis_off()
            if name == SHOWN[0]:
                panel.set_title(title, fontsize="small")
    return figure


if __name__ == "__main__":
    main()
