"""`python -m dit4sr_pl.evaluate`, killed (SIGKILL) at random moments and started again, against an undisturbed run.

    python benchmarks/evaluate_kill.py [--kills 20]

100 small pairs: as finished images, restored by bicubic, and by tiny-dit4sr in one step. Everything that the command
leaves, hidden files too, must be what one undisturbed run leaves, byte for byte. It runs in forks of a process with its
imports done.
"""

import argparse
import functools
import os
import sys
import tempfile
from pathlib import Path

import torch

from dit4sr_pl.common.randomness import generator
from dit4sr_pl.images.files import write_image

sys.path.insert(0, str(Path(__file__).parents[1]))
from testing.sigkill import assert_kills_change_nothing

PAIRS = 100


def main() -> None:
    """Kills every kind of evaluation and compares its files with those of an undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each way")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for i in range(PAIRS):
            hr = torch.rand(3, 64, 64, generator=generator("cpu", i))
            write_image(work / "hr" / f"{i}.png", hr)
            write_image(work / "sr" / f"{i}.png", hr.flip(2))
            write_image(work / "lr" / f"{i}.png", hr[:, ::4, ::4])
        for way, options in ways(work).items():
            target = functools.partial(evaluate, options)
            whole = assert_kills_change_nothing(target, work / way, arguments.kills)
            rounds = len(list((work / way).glob("killed*")))
            print(f"{way}: {arguments.kills} kills in {rounds} runs of {PAIRS} pairs, {len(whole)} files equal")


def ways(work: Path) -> dict[str, list[str]]:
    """Returns the arguments of the kinds of evaluation."""
    pairs = ["dataset=folder", f"dataset.lr={work / 'lr'}", f"dataset.hr={work / 'hr'}"]
    return {
        "finished": [f"images={work / 'sr'}", f"reference={work / 'hr'}"],
        "bicubic": [*pairs, "method=bicubic"],
        "dit4sr": [*pairs, "sampler.steps=1"],
    }


def evaluate(options: list[str], folder: Path) -> None:
    """The command as typed in `folder`."""
    from dit4sr_pl.evaluate import main as command

    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    sys.argv = ["evaluate", "metrics=[psnr,ssim]", "output=scores", *options]
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    command()


if __name__ == "__main__":
    main()
