"""What restoring costs with tiny-dit4sr: peak memory and time per output megapixel, each run in a new process.

    python benchmarks/restoring.py sizes [--sizes 512 1024 2048] [--overrides key=value ...]
    python benchmarks/restoring.py knobs [--sizes 1024]
    python benchmarks/restoring.py seams

`sizes` restores one photo x4 to SIZE x SIZE pixels and writes it, as the command does; memory is the process's peak,
with PyTorch and all weights; time is processor time, which other programs on the machine disturb least. `knobs` does
so at one size with other tiles, steps and batches. `seams` compares the autoencoder in tiles with the whole.
Overrides are those of `dit4sr_pl.restore`.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import process_time

KNOBS = [
    "sampler.tile=16 sampler.overlap=6",
    "sampler.tile=32 sampler.overlap=12",
    "sampler.tile=64 sampler.overlap=24",
    "sampler.tile_batch=1",
    "sampler.tile_batch=16",
    "sampler.steps=10",
    "sampler.steps=40",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sizes", "knobs", "seams", "one"])
    parser.add_argument("--sizes", type=int, nargs="+", help="512 1024 2048, or 1024")
    parser.add_argument("--overrides", nargs="*", default=[])
    args = parser.parse_args()
    if args.what == "one":
        print(*one(args.sizes[0], args.overrides))
    elif args.what == "seams":
        seams()
    elif args.what == "sizes":
        print("| output | processor seconds | per megapixel | peak memory, MiB |\n|---|---|---|---|")
        for size in args.sizes or [512, 1024, 2048]:
            seconds, memory = measured(size, args.overrides)
            print(f"| {size}x{size} | {seconds:.1f} | {seconds / size**2 * 1e6:.2f} | {memory:.0f} |", flush=True)
    else:
        size = args.sizes[0] if args.sizes else 1024
        print(f"| {size}x{size} with | per megapixel | peak memory, MiB |\n|---|---|---|")
        for knobs in KNOBS:
            seconds, memory = measured(size, [*args.overrides, *knobs.split()])
            print(f"| {knobs} | {seconds / size**2 * 1e6:.2f} | {memory:.0f} |", flush=True)


def measured(size: int, overrides: list[str]) -> tuple[float, float]:
    """`one` in a new process."""
    command = [sys.executable, __file__, "one", "--sizes", str(size), "--overrides", *overrides]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, memory = map(float, result.stdout.split())
    return seconds, memory


def one(size: int, overrides: list[str]) -> tuple[float, float]:
    """Processor seconds of restoring and writing one image, models loaded; the process's peak memory in MiB."""
    import torch
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from skimage.data import astronaut

    from dit4sr_pl.config import conf_folder
    from dit4sr_pl.images import write_image
    from dit4sr_pl.latents import enlarge
    from dit4sr_pl.restorer import Restorer

    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("restore", ["device=cpu", *overrides])
    restorer = Restorer.load(
        instantiate(cfg.model.backbone), instantiate(cfg.sampler), cfg.checkpoint, torch.device(cfg.device), cfg.offload
    )
    photo = torch.from_numpy(astronaut()).permute(2, 0, 1)[None] / 255
    lr = enlarge(photo, (size // 4, size // 4))
    start = process_time()
    sr = restorer(lr, (size, size), [cfg.prompt], ["astronaut"], cfg.seed)
    with tempfile.TemporaryDirectory() as folder:
        write_image(Path(folder) / "sr.png", sr[0])
    return process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def seams() -> None:
    """Differences in levels of 255 between an autoencoder in tiles and whole, near the tiles' edges and elsewhere."""
    import torch
    from skimage.data import astronaut

    from dit4sr_pl.backbone import Backbone
    from dit4sr_pl.latents import enlarge

    side, size = 64, 1024
    coder = Backbone("tiny-sd3", "float32", t5_tokens=8).coder
    photo = enlarge(torch.from_numpy(astronaut()).permute(2, 0, 1)[None] / 255, (size, size))
    latents = coder.encode(photo)
    whole = {"encode, latents": latents, "decode, levels of 255": 255 * coder.decode(latents)}
    with coder.tiles(side):
        tiled = {"encode, latents": coder.encode(photo), "decode, levels of 255": 255 * coder.decode(latents)}
    print("| | largest, mean where tiles overlap | largest, mean elsewhere |\n|---|---|---|")
    for name in whole:
        difference = (tiled[name] - whole[name]).abs()
        position = torch.arange(difference.shape[-1]) * size // difference.shape[-1] // coder.factor  # in latents
        seam = (position >= side * 3 // 4) & (position % (side * 3 // 4) < side // 4)
        parts = [difference[..., place] for place in ((seam | seam[:, None]), ~(seam | seam[:, None]))]
        print(f"| {name} | " + " | ".join(f"{part.max():.4f}, {part.mean():.6f}" for part in parts) + " |")


if __name__ == "__main__":
    main()
