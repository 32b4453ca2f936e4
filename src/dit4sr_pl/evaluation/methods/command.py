"""Systems of other authors: their own script, in their own checkout and environment."""

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from dit4sr_pl.common.hashing import file_hash, values_hash
from dit4sr_pl.evaluation.benchmark_sets import SCALE, read
from dit4sr_pl.evaluation.methods import LRImage
from dit4sr_pl.images.files import image_size, write_image
from dit4sr_pl.images.pairs import by_name


class Command:
    """Restores a folder of PNG files by a command line.

    Args:
        label: name of the row, as the paper spells it.
        checkout: the system's repository, in which the command runs.
        python: interpreter of its environment.
        arguments: arguments of the interpreter. `{input}` and `{output}` stand for folders of PNG files, `{prompts}`
            for a folder of captions (`.txt`), `{seed}` for the seed, `{KEY}` for weights by key.
        weights: files and folders by key, relative to the checkout.
        outputs: folder below `{output}` that holds the results.
        suffixes: endings that the script may add to names.
        side: side of the only LR images that the script takes, pixels; None: any.
        seed: seed.
        work: folder for inputs, outputs and `log.txt`.

    Raises:
        FileNotFoundError: checkout, interpreter or weights do not exist.
    """

    variant = ""

    def __init__(
        self,
        label: str,
        checkout: str,
        python: str,
        arguments: list[str],
        weights: dict[str, str],
        outputs: str,
        suffixes: list[str],
        side: int | None,
        seed: int,
        work: str,
    ):
        self.label, self.checkout, self.work = label, Path(checkout).resolve(), Path(work).resolve()
        self.outputs, self.suffixes, self.side = self.work / "sr" / outputs, list(suffixes), side
        weights = {key: self.checkout / path for key, path in weights.items()}
        absent = [f"method.weights.{key}={path}" for key, path in weights.items() if not path.exists()]
        if not self.checkout.is_dir():
            absent.insert(0, f"method.checkout={checkout}")
        if (interpreter := shutil.which(python)) is None:
            absent.insert(0, f"method.python={python}")
        if absent:
            raise FileNotFoundError(f"{label}: these do not exist: {', '.join(absent)} (docs/systems.md)")
        places = {"input": self.work / "lr", "output": self.work / "sr", "prompts": self.work / "prompts"}
        try:
            filled = [part.format(**places, **weights, seed=seed) for part in map(str, arguments)]
        except KeyError as error:
            raise ValueError(f"method.arguments: {{{error.args[0]}}} is no placeholder") from None
        self.command = [os.path.abspath(interpreter), *filled]  # the command runs elsewhere
        hashes = {key: file_hash(path) for key, path in weights.items()}
        self.weights_hash = values_hash(hashes) if hashes else ""
        self.network_config = {}
        self.identity = {"arguments": list(arguments), "weights": hashes, "seed": seed}

    def __call__(self, lr_images: Iterable[LRImage]) -> Iterator[tuple[str, Tensor]]:
        for folder in ("lr", "sr", "prompts"):
            shutil.rmtree(self.work / folder, ignore_errors=True)
            (self.work / folder).mkdir(parents=True)
        sizes = {}
        for image in lr_images:
            if "/" in image.name:
                raise ValueError(f"{image.name}: {self.label} takes the images of one folder, not of folders in it")
            height, width = image.lr.shape[-2:]
            if self.side is not None and (height, width) != (self.side, self.side):
                raise ValueError(f"{image.name}: {width}x{height}; {self.label}'s script takes {self.side}x{self.side}")
            write_image(self.work / "lr" / f"{image.name}.png", image.lr[0])
            (self.work / "prompts" / f"{image.name}.txt").write_text(image.caption)
            sizes[image.name] = (SCALE * width, SCALE * height)
        self.run()
        for name, path in self.collect(sizes).items():
            yield name, read(path)[0]
        for folder in ("lr", "sr", "prompts"):
            shutil.rmtree(self.work / folder)

    def run(self) -> None:
        """Runs the command; raises ValueError, which names the log, if it fails."""
        log = self.work / "log.txt"
        with log.open("w") as file:
            print(*self.command, file=file, flush=True)
            code = subprocess.run(self.command, cwd=self.checkout, stdout=file, stderr=subprocess.STDOUT).returncode
        if code:
            last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
            raise ValueError(f"{self.label}: its command ended with exit code {code} ({last[-200:]}); see {log}")

    def collect(self, sizes: dict[str, tuple[int, int]]) -> dict[str, Path]:
        """Returns the results by name.

        Raises:
            ValueError: results are missing or have another size than `sizes`; the message lists them.
        """
        try:
            written = by_name(self.outputs)
        except (FileNotFoundError, ValueError):
            written = {}
        # One suffix for all: of `a` and `a_0` the script may make `a_0` and `a_0_0`.
        kept = [{name: written[name + end] for name in sizes if name + end in written} for end in self.suffixes]
        found = max(kept, key=len)
        if missing := sizes.keys() - found.keys():
            log = self.work / "log.txt"
            raise ValueError(f"{self.label}: no result in {self.outputs} for {', '.join(sorted(missing))}; see {log}")
        wrong = [f"{path} {image_size(path)}" for name, path in found.items() if image_size(path) != sizes[name]]
        if wrong:
            raise ValueError(f"{self.label}: not {SCALE} times as large as the LR image: {', '.join(wrong)}")
        return found
