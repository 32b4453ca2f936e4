"""`python -m dit4sr_pl.prepare`, killed (SIGKILL) at random moments and started again, against an undisturbed run.

    python benchmarks/prepare_kill.py [--kills 20]

Each stage on 200 small photos with captions: toy LLaVA, tiny-sd3. Everything that a stage leaves, hidden files too,
must be what one undisturbed run leaves, byte for byte. The command runs in forks of a process with its imports done.
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
from testing.toy_llava import save_toy_llava

PHOTOS = 200


def main() -> None:
    """Kills every stage and compares its files with those of an undisturbed run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each stage")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for i in range(PHOTOS):
            write_image(work / "photos" / f"{i}.png", torch.rand(3, 40, 40, generator=generator("cpu", i)))
            (work / "photos" / f"{i}.txt").write_text(f"{i}")
        save_toy_llava(work / "llava")
        for stage, options in stages(work).items():
            target = functools.partial(prepare, stage, options)
            whole = assert_kills_change_nothing(target, work / stage, arguments.kills)
            rounds = len(list((work / stage).glob("killed*")))
            print(f"{stage}: {arguments.kills} kills in {rounds} runs of {PHOTOS} photos, {len(whole)} files equal")


def stages(work: Path) -> dict[str, list[str]]:
    """Returns the arguments of the stages."""
    photos = f"+data.sets.x.folder={work / 'photos'}"
    llava = [f"captioner.name={work / 'llava'}", "captioner.dtype=float32", "captioner.max_tokens=6", "batch_size=2"]
    return {
        "captions": [photos, "+data.sets.x.captions=captions", *llava],
        "embeddings": [photos, "embeddings=embeddings", "file_megabytes=0.05"],
        "manifest": [photos, "+data.sets.x.manifest=manifest.parquet", "processes=1"],
    }


def prepare(stage: str, options: list[str], folder: Path) -> None:
    """The command as typed in `folder`."""
    from dit4sr_pl.prepare import main as command

    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    sys.argv = ["prepare", f"stage={stage}", *options]
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    command()


if __name__ == "__main__":
    main()
