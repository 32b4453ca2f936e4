"""Seconds of one restored picture from file to file, by part, for a teacher and its students in one run.

    python benchmarks/file_to_file.py [--checkpoints tiny-dit4sr STUDENT ...] [--repeats 5] [key=value ...]

The LR file has 128x128 pixels, the result 512x512. Networks are loaded before, and one picture warms each of them up.
The checkpoints take turns; every number is the median of `--repeats` pictures. The prompts are encoded anew for every
picture. Where the device is a GPU, every part ends when its work is done. Overrides are those of `dit4sr_pl.restore`,
such as `device=cuda`, `compile=true`, `backbone=sd35_medium` or `captioner=llava`; all checkpoints must be of that
backbone.
"""

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from skimage.data import astronaut

from dit4sr_pl.backbone.autoencoder import LatentCoder
from dit4sr_pl.cli.checks import choose_device
from dit4sr_pl.cli.command import read_conf
from dit4sr_pl.common.markdown import markdown_table
from dit4sr_pl.images.files import read_image, write_image
from dit4sr_pl.images.picture_files import read_picture, write_picture
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.model import Student, load_part
from dit4sr_pl.model.checkpoint_files import checkpoint_file
from dit4sr_pl.restoration import sampling
from dit4sr_pl.restoration.pictures import PictureRestorer
from dit4sr_pl.restoration.restorer import Restorer

LR_SIDE, SCALE = 128, 4
PARTS = ("read", "caption", "text", "encode", "sampling", "decode", "align", "write", "everything else")


class Clock:
    """Adds up the seconds of parts; on a GPU a part ends when its work is done.

    Args:
        device: the device that works.
    """

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, Counter()

    def now(self) -> float:
        """Returns the time at which all work so far is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the seconds of the block to a part."""
        start = self.now()
        yield
        self.seconds[name] += self.now() - start

    def timed(self, name: str, function: Callable) -> Callable:
        """Returns a function whose calls add to a part."""

        def call(*arguments, **options):
            with self.part(name):
                return function(*arguments, **options)

        return call

    def timed_steps(self, name: str, function: Callable) -> Callable:
        """Returns a generator function whose steps, and not what happens between them, add to a part."""

        def call(*arguments, **options):
            steps = iter(function(*arguments, **options))
            while True:
                with self.part(name):
                    step = next(steps, None)
                if step is None:
                    return
                yield step

        return call


@contextmanager
def timing(clock: Clock) -> Iterator[None]:
    """Times the parts of `restore` while the block runs."""
    with ExitStack() as stack:
        patch = lambda owner, name, value: stack.enter_context(mock.patch.object(owner, name, value))  # noqa: E731
        patch(sampling.GuidedVelocity, "of_captions", clock.timed("text", sampling.GuidedVelocity.of_captions))
        patch(sampling, "states", clock.timed_steps("sampling", sampling.states))
        patch(LatentCoder, "encode_tiled", clock.timed("encode", LatentCoder.encode_tiled))
        patch(LatentCoder, "decode_tiled", clock.timed_steps("decode", LatentCoder.decode_tiled))
        patch(sampling, "align", clock.timed("align", sampling.align))
        yield


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", nargs="+", default=["tiny-dit4sr"], help="the teacher first")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("overrides", nargs="*", help="of `dit4sr_pl.restore`")
    args = parser.parse_intermixed_args()
    cfg = read_conf("restore", "input=unused", *args.overrides)
    cfg.device = choose_device(cfg.device)
    restorers = load(cfg, args.checkpoints)
    captioner = None if cfg.get("captioner") is None else instantiate(cfg.captioner)
    seconds = {checkpoint: [] for checkpoint in restorers}
    with tempfile.TemporaryDirectory() as folder:
        lr = Path(folder) / "lr.png"
        photo = torch.from_numpy(astronaut()).permute(2, 0, 1)[None] / 255
        write_image(lr, enlarge(photo, (LR_SIDE, LR_SIDE))[0])
        for repeat in range(args.repeats + 1):
            for checkpoint, restorer in restorers.items():
                taken = one(restorer, captioner, lr, torch.device(cfg.device))
                if repeat:  # the first picture warms up
                    seconds[checkpoint].append(taken)
    report(seconds, restorers, captioner is not None)
    where = torch.cuda.get_device_name(cfg.device) if cfg.device.startswith("cuda") else f"{cfg.device}, "
    threads = "" if cfg.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    print(f"\n{where}{threads}, {cfg.model.backbone.dtype}, median of {args.repeats} pictures")


def load(cfg: DictConfig, checkpoints: list[str]) -> dict[str, Restorer]:
    """Returns networks over one backbone by their checkpoints, each with the sampler that it needs."""
    backbone, restorers = instantiate(cfg.model.backbone), {}
    options = torch.device(cfg.device), cfg.offload, cfg.injection_scale, cfg.compile, cfg.cuda_graph
    for checkpoint in checkpoints:
        student = Student.of(load_part(checkpoint_file(checkpoint)).network_config)
        restorers[checkpoint] = Restorer.load(
            backbone, instantiate(cfg.sampler).for_student(student), checkpoint, *options
        )
    return restorers


def one(restorer: Restorer, captioner: Callable | None, lr: Path, device: torch.device) -> Counter:
    """Returns the seconds of one picture by part, and those of all as `file to file`."""
    clock = Clock(device)
    if hasattr(restorer.backbone.prompts, "remembered"):
        restorer.backbone.prompts.remembered.clear()
    with clock.part("file to file"), timing(clock):
        with clock.part("read"):
            picture = read_picture(lr)
        caption = ""
        if captioner is not None:
            with clock.part("caption"):
                (caption,) = captioner([read_image(lr)])
        (restored,) = PictureRestorer(restorer, SCALE, "bicubic", seed=0)([picture], ["lr"], [caption], lambda _: None)
        with clock.part("write"):
            write_picture(lr.with_name("sr.png"), restored)
    whole = clock.seconds["file to file"]
    clock.seconds["everything else"] = 2 * whole - clock.seconds.total()
    return clock.seconds


def report(seconds: dict[str, list[Counter]], restorers: dict[str, Restorer], captions: bool) -> None:
    """Prints a row per part and a column per checkpoint; the last rows are the sum and its ratio to the first's."""
    median = lambda name, each: statistics.median(taken[name] for taken in each)  # noqa: E731
    rows = [["evaluations", *(str(restorer.evaluations) for restorer in restorers.values())]]
    for name in (*PARTS, "file to file"):
        missing = name == "caption" and not captions
        rows.append([name, *("none" if missing else f"{median(name, each):.4f}" for each in seconds.values())])
    for name in ("sampling", "file to file"):
        first, *_ = totals = [median(name, each) for each in seconds.values()]
        rows.append([f"{name}, to the first", *(f"{total / first:.2f}" for total in totals)])
    print(markdown_table(["seconds", *seconds], rows))


if __name__ == "__main__":
    main()
