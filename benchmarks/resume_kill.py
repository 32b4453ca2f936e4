"""Kills a training (SIGKILL) at random moments, resumes it, and compares it with an undisturbed one.

    python benchmarks/resume_kill.py [--kills 20] [--full-disk] [--steps 200] [--every 10] [KEY=VALUE ...]

Every start is `python -m dit4sr_pl.train experiment=resume_check output=FOLDER KEY=VALUE ...`, with `--steps` steps and
a checkpoint every `--every` steps. Every fourth kill comes while the command starts, the others during the training.
All losses (also those of repeated steps), the weights before and after averaging, the optimizer's state and the losses
in TensorBoard must be equal to the last bit, and the newest checkpoint must never be lost.

With `--full-disk` (as root) the run lies on a file system of its own, which is filled at random moments and freed again
within some steps. A run that ends for it is started again. Losses that could not be written are missing; weights and
the optimizer's state must be equal to the last bit.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import load_file

from dit4sr_pl.model.training_state import is_whole
from dit4sr_pl.training.run_folder import checkpoints_in

sys.path.insert(0, str(Path(__file__).parents[1]))
from testing.toy_runs import events


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--full-disk", action="store_true", help="fill the disk instead of killing")
    parser.add_argument("--megabytes", type=int, default=400, help="size of the file system that is filled")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    options = [
        *arguments.overrides,
        f"trainer.max_steps={arguments.steps}",
        f"callbacks.checkpoint.every_n_train_steps={arguments.every}",
    ]
    with tempfile.TemporaryDirectory() as work:
        whole, killed = Path(work) / "whole", Path(work) / "killed"
        start_up, training = through(whole, options)
        print(
            f"undisturbed: {start_up:.0f} s to the first loss, {training:.0f} s of {arguments.steps} steps", flush=True
        )
        seen, draws = Counter(), random.Random(0)
        if arguments.full_disk:
            with file_system(killed, arguments.megabytes):
                starts = disturb(killed / "run", options, arguments.kills, training, draws)
                compare(whole, killed / "run", seen, complete=False)
            print(f"disk full {arguments.kills} times, {starts} starts: weights and optimizer equal to the last bit")
            return
        for kill in range(arguments.kills):
            before, process = newest(killed), command(killed, options)
            if kill % 4 == 0:
                time.sleep(draws.random() * start_up)
            else:
                further = draws.randrange(1, 1 + 2 * arguments.steps // arguments.kills)
                wait_for_loss(process, killed, min(before + further, arguments.steps - 2))
                time.sleep(draws.random() * training / arguments.steps)
            assert process.poll() is None, "the run ended before its kills; give it more --steps"
            process.kill()
            process.wait()
            assert newest(killed) >= before and all(is_whole(path) for path in checkpoints_in(killed))
            seen.update(losses(killed).items())
            print(f"kill {kill + 1}: checkpoint {newest(killed)}, losses up to {len(losses(killed))}", flush=True)
        through(killed, options)
        compare(whole, killed, seen)
        print(f"{arguments.kills} kills: {arguments.steps} losses, weights and optimizer equal to the last bit")


@contextmanager
def file_system(folder: Path, megabytes: int) -> Iterator[None]:
    """Mounts a file system of its own on a folder while the context is open."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def disturb(folder: Path, options: list[str], times: int, training: float, draws: random.Random) -> int:
    """Trains to the end while the disk is filled and freed at random moments; returns the number of starts.

    Args:
        folder: the run's folder.
        options: overrides of the command.
        times: how often the disk is filled.
        training: seconds that the steps of an undisturbed run take.
        draws: source of the moments.
    """
    ballast, process, starts = folder.parent / "ballast", command(folder, options), 1
    wait_for_loss(process, folder, 1)
    for number in range(1, times + 1):
        time.sleep(draws.random() * training / times)
        if process.poll():
            process, starts = command(folder, options), starts + 1
        assert process.poll() is None, "the run ended before the disk was filled as often; give it more --steps"
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        time.sleep(draws.random() * training / times / 2)
        ballast.unlink()
        print(f"full {number}: checkpoint {newest(folder)}, start {starts}", flush=True)
    while process.wait():
        process, starts = command(folder, options), starts + 1
    return starts


def command(folder: Path, options: list[str]) -> subprocess.Popen:
    """Starts or resumes the training."""
    arguments = ["experiment=resume_check", f"output={folder}", *options]
    with output_of(folder).open("a") as log:
        return subprocess.Popen([sys.executable, "-m", "dit4sr_pl.train", *arguments], stdout=log, stderr=log)


def output_of(folder: Path) -> Path:
    """Returns the file of what a run prints, which never lies on the disk that is filled."""
    place = folder.parent.parent if folder.name == "run" else folder.parent
    return place / "output.log"


def through(folder: Path, options: list[str]) -> tuple[float, float]:
    """Trains to the end and returns the seconds to the first loss and from there to the end."""
    start = time.monotonic()
    process = command(folder, options)
    wait_for_loss(process, folder, 1)
    first = time.monotonic()
    assert process.wait() == 0, output_of(folder).read_text()
    return first - start, time.monotonic() - first


def wait_for_loss(process: subprocess.Popen, folder: Path, batch: int) -> None:
    """Waits until a process has written the loss of a batch."""
    path, start = folder / "losses.csv", time.time()
    while not (path.exists() and path.stat().st_mtime > start and len(losses(folder)) >= batch):
        assert process.poll() is None, output_of(folder).read_text()
        time.sleep(0.05)


def losses(folder: Path) -> dict[int, str]:
    """Returns the losses by batch, as text; a row that a kill cut off is left out."""
    path = folder / "losses.csv"
    text = path.read_text() if path.exists() else ""
    rows = [line.strip().split(",") for line in text.splitlines(keepends=True)[1:] if line.endswith("\n")]
    return {int(batch): loss for batch, loss in rows}


def newest(folder: Path) -> int:
    """Returns the step of the newest checkpoint; 0: there is none."""
    return next((int(path.stem) for path in checkpoints_in(folder)), 0)


def compare(whole: Path, killed: Path, seen: Counter, complete: bool = True) -> None:
    """Asserts that two runs are equal; `seen` has all losses (batch, text) that the killed run ever wrote.

    With `complete=False` losses may be missing.
    """
    assert losses(killed).items() <= losses(whole).items()
    assert all(losses(whole)[batch] == loss for batch, loss in seen)
    ours, theirs = ({(e.step, e.value) for e in events(folder).Scalars("train/loss")} for folder in (killed, whole))
    assert ours <= theirs, "TensorBoard shows other losses"
    assert not complete or (losses(killed) == losses(whole) and ours == theirs)
    assert_equal(*(load_file(folder / "lr_stream.safetensors") for folder in (killed, whole)))
    ours, theirs = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (killed, whole))
    for name in ("state_dict", "current_model_state", "averaging_state"):
        assert_equal(ours[name], theirs[name])
    ours, theirs = (checkpoint["optimizer_states"][0]["state"] for checkpoint in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for number in theirs:
        assert_equal(ours[number], theirs[number])


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Asserts that tensors are equal by name."""
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


if __name__ == "__main__":
    main()
