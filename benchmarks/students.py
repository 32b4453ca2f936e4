"""Figures of students next to those of their teacher, and of what makes the teacher cheaper without training.

    python benchmarks/students.py [--students STUDENT ...] [--crops 16] [--teacher tiny-dit4sr]

Photos, crops, degradation and scores are those of `tiny.py`. The first row is the teacher with 20 steps from noise, and
the others are relative to it: ST-LPIPS as a ratio, PSNR as a difference, seconds per image as a ratio, once of
everything from the LR image to the result and once of sampling alone. On every photo the rows take turns.
"""

import argparse

import torch
from file_to_file import Clock, timing
from hydra.utils import instantiate
from rich.progress import track
from tiny import CROP, photos, psnr

from dit4sr_pl.cli.command import read_conf
from dit4sr_pl.common.markdown import markdown_table
from dit4sr_pl.common.randomness import derive_seed
from dit4sr_pl.model import Student, load_part
from dit4sr_pl.model.checkpoint_files import checkpoint_file
from dit4sr_pl.model.trained_part import method_and_variant
from dit4sr_pl.restoration.restorer import Restorer
from dit4sr_pl.scores.pyiqa_loading import create

WHOLE = ["sampler.steps=20", "sampler.start=noise"]
TEACHER = {  # how the teacher samples, by the row's name; all rows have the same alignment of colours
    "20 steps": WHOLE,
    "its own sampler": [],
    "dpm, 10 steps": [*WHOLE, "sampler/solver=dpm", "sampler.steps=10"],
    "lr_refresh=4": [*WHOLE, "sampler.lr_refresh=4"],
    "dpm, 10 steps, lr_refresh=2": [*WHOLE, "sampler/solver=dpm", "sampler.steps=10", "sampler.lr_refresh=2"],
}
HEADS = ("", "evaluations", "ST-LPIPS", "to the teacher's", "PSNR", "more than the teacher's")
HEADS += ("seconds per image", "to the teacher's", "of sampling")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="tiny-dit4sr")
    parser.add_argument("--students", nargs="*", default=[])
    parser.add_argument("--crops", type=int, default=16, help="at most, per photo: evenly spread over its grid")
    parser.add_argument("--photos", type=int, help="at most; None: all")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    restorers = load(args.teacher, args.students, device)
    for restorer in restorers.values():  # warms up
        restorer(torch.rand(1, 3, CROP // 4, CROP // 4), (CROP, CROP), [""], ["warm-up"], 0)
    report(restorers, measured(restorers, list(photos(args.crops))[: args.photos], device))


def load(teacher: str, students: list[str], device: torch.device) -> dict[str, Restorer]:
    """Returns the restorer of every row by its name."""
    cfg = read_conf("restore", "input=unused")
    backbone, sampler = instantiate(cfg.model.backbone), instantiate(cfg.sampler)
    net = Restorer.load(backbone, sampler, teacher, device).net
    restorers = {}
    for name, overrides in TEACHER.items():
        chosen = instantiate(read_conf("restore", "input=unused", *overrides).sampler)
        restorers[f"teacher, {name}"] = Restorer(net, backbone, chosen)
    for student in students:
        network_config = load_part(checkpoint_file(student)).network_config
        fitting = sampler.for_student(Student.of(network_config))
        name = f"{' '.join(method_and_variant(network_config)).strip()} ({student})"
        restorers[name] = Restorer.load(backbone, fitting, student, device)
    return restorers


def measured(restorers: dict[str, Restorer], crops: list, device: torch.device) -> list[list[float]]:
    """Returns ST-LPIPS, PSNR, seconds per image and those of sampling, of every restorer, means over photos.

    Args:
        restorers: restorers by name.
        crops: names of photos and their crops, `(B, 3, S, S)` in 0..1.
        device: where networks work.
    """
    degradation, stlpips = instantiate(read_conf("train", "output=unused").degradation), create("stlpips")
    scores = []
    for photo, hr in track(crops, description="photos"):
        lr, _ = degradation(hr, degradation.draw([derive_seed(photo, i) for i in range(len(hr))], (CROP, CROP)))
        scores.append([])
        for restorer in restorers.values():
            clock = Clock(device)
            with clock.part("all"), timing(clock):
                sr = restorer(lr, (CROP, CROP), [""] * len(hr), [f"{photo}{i}" for i in range(len(hr))], 0)
            seconds = [clock.seconds[part] / len(hr) for part in ("all", "sampling")]
            scores[-1].append([stlpips(sr, hr).mean().item(), psnr(sr, hr), *seconds])
    return torch.tensor(scores).mean(dim=0).tolist()


def report(restorers: dict[str, Restorer], scores: list[list[float]]) -> None:
    """Prints a row per restorer."""
    base, rows = scores[0], []
    for (name, restorer), (stlpips, db, seconds, sampling) in zip(restorers.items(), scores, strict=True):
        row = [name, str(restorer.evaluations), f"{stlpips:.4f}", f"{stlpips / base[0]:.3f}", f"{db:.2f}"]
        row += [f"{db - base[1]:+.2f}", f"{seconds:.3f}", f"{seconds / base[2]:.2f}", f"{sampling / base[3]:.2f}"]
        rows.append(row)
    print(markdown_table(HEADS, rows))


if __name__ == "__main__":
    main()
