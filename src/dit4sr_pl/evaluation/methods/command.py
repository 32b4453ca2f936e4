"""Systems of other authors: their own script, in their own checkout and environment."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from dit4sr_pl.common.files import atomic_write
from dit4sr_pl.common.hashing import file_hash, values_hash
from dit4sr_pl.common.processes import run_to_end
from dit4sr_pl.common.secrets import hidden
from dit4sr_pl.evaluation.benchmark_sets import SCALE, read
from dit4sr_pl.evaluation.methods import LRImage
from dit4sr_pl.images.files import check_image, write_image
from dit4sr_pl.images.pairs import by_name

SIZES = "sizes.json"  # of the results that a running call will have made, in its work folder


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
            raise ValueError(
                f"method.arguments: {{{error.args[0]}}} is no placeholder; "
                f"write {{input}}, {{output}}, {{prompts}}, {{seed}} or a key of method.weights"
            ) from None
        except (IndexError, ValueError) as error:
            raise ValueError(
                f"method.arguments: a brace outside of a placeholder ({error}); write {{{{ or }}}}"
            ) from None
        self.command = [os.path.abspath(interpreter), *filled]  # the command runs elsewhere
        hashes = {key: file_hash(path) for key, path in weights.items()}
        self.weights_hash = values_hash(hashes) if hashes else ""
        self.network_config = {}
        self.identity = {"arguments": list(arguments), "weights": hashes, "seed": seed}

    def __call__(self, lr_images: Iterable[LRImage]) -> Iterator[tuple[str, Tensor]]:
        """Restores all images by one call of the command; yields what it has made, also if some are missing.

        Results of a call that was stopped are taken, so that the command gets the other images only.

        Raises:
            ValueError: the command failed, or results are missing or of another size; all others were yielded before.
        """
        made, _ = self.collect(self.begun())
        for folder in ("lr", "prompts"):
            self.clear(folder)
        sizes = {}
        for image in lr_images:
            self.check(image)
            height, width = image.lr.shape[-2:]
            if image.name in made:
                yield image.name, read(made[image.name])[0]
                continue
            write_image(self.work / "lr" / f"{image.name}.png", image.lr[0])
            (self.work / "prompts" / f"{image.name}.txt").write_text(image.caption, encoding="utf-8")
            sizes[image.name] = (SCALE * width, SCALE * height)
        if not sizes:
            return
        self.clear("sr")
        with atomic_write(self.work / SIZES) as partial:
            partial.write_text(json.dumps(sizes), encoding="utf-8")
        failure = self.run()
        found, problems = self.collect(sizes)
        for name, path in found.items():
            yield name, read(path)[0]
        if failure or problems:
            raise ValueError(f"{self.label}: {'; '.join(failure or problems)}; see {self.work / 'log.txt'}")
        for folder in ("lr", "sr", "prompts"):
            shutil.rmtree(self.work / folder)
        (self.work / SIZES).unlink()

    def check(self, image: LRImage) -> None:
        """Raises ValueError for an image that the script does not take."""
        if "/" in image.name:
            raise ValueError(
                f"{image.name}: {self.label} takes the images of one folder, not of folders in it; move them up"
            )
        height, width = image.lr.shape[-2:]
        if self.side is not None and (height, width) != (self.side, self.side):
            raise ValueError(
                f"{image.name}: {width}x{height}; {self.label}'s script takes {self.side}x{self.side}; "
                "crop them, or take another method"
            )

    def clear(self, folder: str) -> None:
        """Makes an empty folder for the command."""
        shutil.rmtree(self.work / folder, ignore_errors=True)
        (self.work / folder).mkdir(parents=True)

    def begun(self) -> dict[str, tuple[int, int]]:
        """Returns names and sizes of the results that a stopped call was to make; {} without one."""
        try:
            sizes = json.loads((self.work / SIZES).read_text(encoding="utf-8"))
            return {name: tuple(size) for name, size in sizes.items()}
        except (FileNotFoundError, ValueError, AttributeError, TypeError):
            return {}

    def run(self) -> list[str]:
        """Runs the command; returns a message with the last line of its log if it fails, else []."""
        log = self.work / "log.txt"
        with log.open("w", encoding="utf-8") as file:
            print(*map(hidden, self.command), file=file, flush=True)
            code = run_to_end(self.command, self.checkout, file)
        if not code:
            return []
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1]
        return [f"its command ended with exit code {code} ({last[-200:]})"]

    def collect(self, sizes: dict[str, tuple[int, int]]) -> tuple[dict[str, Path], list[str]]:
        """Returns the results by name, and messages about those that are missing or have another size than `sizes`."""
        try:
            written = by_name(self.outputs)
        except (FileNotFoundError, ValueError):
            written = {}
        # One suffix for all: of `a` and `a_0` the script may make `a_0` and `a_0_0`.
        kept = [{name: written[name + end] for name in sizes if name + end in written} for end in self.suffixes]
        found = max(kept, key=len)
        wrong = {name: state for name, path in found.items() if (state := size_of(path)) != sizes[name]}
        problems = []
        if missing := sizes.keys() - found.keys():
            problems.append(f"no result in {self.outputs} for {', '.join(sorted(missing))}")
        if wrong:
            listed = ", ".join(f"{found[name]} {state}" for name, state in wrong.items())
            problems.append(f"not {SCALE} times as large as the LR image: {listed}")
        return {name: path for name, path in found.items() if name not in wrong}, problems


def size_of(path: Path) -> tuple[int, int] | str:
    """Returns width and height of a whole image; of one that a stopped script left, what is wrong with it."""
    try:
        return check_image(path)
    except ValueError:
        return "(damaged)"
