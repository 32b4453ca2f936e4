"""Draws the ablation's ST-LPIPS over training steps, of photos and of text apart.

    python scripts/ablation_curves.py outputs/ablation --output outputs/ablation/curves.png

A run's TensorBoard log has a picture LR | bicubic | restored | ground truth of every held-out crop after every
validation. The scores are measured on those. The script writes a chart and prints a table with, at every step, the mean
over crops and seeds as a ratio to bicubic's, and in brackets the lowest and the highest seed.
"""

import argparse
import io
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from dit4sr_pl.common.files import atomic_write
from dit4sr_pl.common.markdown import markdown_table
from dit4sr_pl.comparison.rows import variant_label
from dit4sr_pl.data.demo_photos import WRITING
from dit4sr_pl.scores.pyiqa_loading import create

ORDER = (
    *("full", "no_lr_integration", "no_lr_residual", "no_lr_injection", "linear_lr_injection"),
    "sd3_controlnet",
)
TAG = "val/"  # of the pictures, followed by the crop's name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the runs, VARIANT/seedK")
    parser.add_argument("--output", type=Path, required=True, help="PNG file of the chart")
    args = parser.parse_args()

    score = create("stlpips")
    curves = {name: curve for name in ORDER if (curve := of_variant(args.folder / name, score))}
    if not curves:
        raise SystemExit(f"{args.folder}: no run with a validation; run `make ablation` first")
    for part in ("photos", "text"):
        steps = sorted({step for curve in curves.values() for step in curve[part]})
        rows = [
            [variant_label(name), *(cell(curve[part].get(step, [])) for step in steps)]
            for name, curve in curves.items()
        ]
        print(markdown_table([part, *(f"step {step}" for step in steps)], rows) + "\n")
    with atomic_write(args.output) as partial:
        chart(curves).savefig(partial, format="png", dpi=150)


def of_variant(folder: Path, score: torch.nn.Module) -> dict[str, dict[int, list[float]]]:
    """Returns the ratio to bicubic's ST-LPIPS of every seed, by part (photos, text) and step."""
    curve = {"photos": defaultdict(list), "text": defaultdict(list)}
    for run in sorted(folder.glob("seed*")):
        sums = defaultdict(lambda: np.zeros(2))
        for step, name, bicubic, restored, truth in pictures(run):
            part = "text" if name.startswith(WRITING) else "photos"
            sums[part, step] += score(torch.stack([restored, bicubic]), torch.stack([truth, truth])).flatten().tolist()
        for (part, step), (ours, bicubics) in sums.items():
            curve[part][step].append(ours / bicubics)
    return curve if curve["photos"] else {}


def pictures(run: Path) -> Iterator[tuple[int, str, Tensor, Tensor, Tensor]]:
    """Yields step, crop's name, bicubic, restored and true image `(3, H, W)` in 0..1 of a run's validations."""
    log = EventAccumulator(str(run), size_guidance={"images": 0})
    log.Reload()
    for tag in log.Tags()["images"]:
        for event in log.Images(tag) if tag.startswith(TAG) else ():
            strip = torch.tensor(np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))) / 255
            _, bicubic, restored, truth = strip.permute(2, 0, 1).chunk(4, dim=-1)
            yield event.step + 1, tag.removeprefix(TAG), bicubic, restored, truth


def cell(seeds: list[float]) -> str:
    """Returns the mean of the seeds, and the lowest and the highest of several."""
    if not seeds:
        return ""
    spread = f" [{min(seeds):.3f}, {max(seeds):.3f}]" if len(seeds) > 1 else ""
    return f"{np.mean(seeds):.3f}{spread}"


def chart(curves: dict[str, dict[str, dict[int, list[float]]]]) -> Figure:
    """Returns two panels, of photos and of text: a line per variant through its means, with the seeds' spread."""
    figure = Figure((9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, part in zip(panels, ("photos", "text"), strict=True):
        for name, curve in curves.items():
            steps = sorted(curve[part])
            seeds = [curve[part][step] for step in steps]
            (line,) = panel.plot(steps, [np.mean(values) for values in seeds], marker="o", label=variant_label(name))
            panel.fill_between(
                steps, *zip(*((min(v), max(v)) for v in seeds), strict=True), color=line.get_color(), alpha=0.15
            )
        panel.axhline(1, color="grey", linestyle=":", label="bicubic")
        panel.set_title(part)
        panel.set_xlabel("training step")
    panels[0].set_ylabel("ST-LPIPS, ratio to bicubic's")
    panels[1].legend(fontsize="small")
    return figure


if __name__ == "__main__":
    main()
