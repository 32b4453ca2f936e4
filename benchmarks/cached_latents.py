"""Compares a training step on latents that were encoded before with the step that degrades and encodes its images.

    python benchmarks/cached_latents.py [--repeats 7] [key=value ...]

Both steps, forward, backward and optimizer, train the same network on the same batch of `experiment=demo` and take
turns in one process; `key=value` are overrides of `train`, such as `model=dit4sr trainer=gpu data.batch_size=8`.
Latents are in memory, so neither workers nor disks count. `encodings` are those of the autoencoder per image.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from dit4sr_pl.backbone.autoencoder import LatentCoder
from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.markdown import markdown_table


class Training:
    """A module, its optimizer and one batch, as images and as latents.

    Args:
        overrides: overrides of `train`.
        folder: folder of the run, in which nothing is written.
    """

    def __init__(self, overrides: list[str], folder: str):
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            cfg = compose("train", ["experiment=demo", "data.num_workers=0", f"output={folder}", *overrides])
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        half = str(cfg.trainer.precision).startswith("bf16")
        self.autocast = torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext()
        self.data, self.module = instantiate(cfg.data), instantiate(cfg.model).to(self.device)
        strategy = SimpleNamespace(reduce=lambda loss, reduce_op: loss)
        trainer = SimpleNamespace(strategy=strategy, datamodule=self.data, global_step=0)
        self.module.log, self.module._trainer = lambda *_, **__: None, trainer
        self.module.setup("fit")
        self.optimizer = self.module.configure_optimizers()
        batch = next(iter(self.data.train_dataloader()))
        self.images = self.data.transfer_batch_to_device(batch, self.device, 0)
        ready = self.data.on_after_batch_transfer(self.images, 0)
        clean, lr_latent = self.module.latents(ready)
        kept = {key: self.images[key] for key in ("position", "prompt", "timestep", "sigma", "noise")}
        self.latents = kept | {"clean": clean, "lr_latent": lr_latent}

    def step(self, batch: dict[str, Any]) -> None:
        """Takes one training step."""
        with self.autocast:
            loss = self.module.training_step(self.data.on_after_batch_transfer(batch, 0), 0)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def seconds(run: Callable[[], None]) -> float:
    """Returns how long a call takes."""
    start = perf_counter()
    run()
    return perf_counter() - start


def encodings(run: Callable[[], None]) -> int:
    """Returns how many images the autoencoder encodes during a call."""
    counted, encode = [], LatentCoder.encode
    LatentCoder.encode = lambda self, images, *rest: counted.append(len(images)) or encode(self, images, *rest)
    try:
        run()
    finally:
        LatentCoder.encode = encode
    return sum(counted)


def main() -> None:
    """Prints the times of both steps and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        training = Training(args.overrides, folder)
    steps = {
        "autoencoder": lambda: training.step(training.images),
        "cached latents": lambda: training.step(training.latents),
    }
    images = len(training.latents["position"])
    counts = {name: encodings(step) / images for name, step in steps.items()}  # also warms up
    times = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            times[name].append(seconds(step))
    rows = [[name, f"{median(times[name]):.3f}", f"{min(times[name]):.3f}", f"{counts[name]:g}"] for name in steps]
    print(
        f"{images} images of {training.images['image'].shape[-1]} pixels on {training.device}, {args.repeats} repeats"
    )
    print(markdown_table(["step with", "median s", "min s", "encodings"], rows))
    ratios = [pick(times["cached latents"]) / pick(times["autoencoder"]) for pick in (median, min)]
    print(f"cached latents / autoencoder: {ratios[0]:.2f} (medians), {ratios[1]:.2f} (minima)")


if __name__ == "__main__":
    main()
