"""Measures what restoring costs with tiny-dit4sr: peak memory and time per output megapixel, each in a new process.

    python benchmarks/restoring.py sizes [--sizes 512 1024x2048 ...] [--without-networks] [--overrides key=value ...]
    python benchmarks/restoring.py knobs [--sizes 1024]
    python benchmarks/restoring.py tiles
    python benchmarks/restoring.py seams [--backbone NAME]

`sizes` restores one photo x4 to each size, from file to file as the command does; memory is the process's peak, with
PyTorch and all weights; time is processor time, which other programs on the machine disturb least.
`--without-networks` takes means of 8x8 pixels as latents and the LR latent as the result's, so that the cost of
everything except the networks remains. `knobs` measures one size with other tiles, steps and batch sizes. `tiles`
counts the values that a forward pass over tiles keeps at its peak, on tensors without memory. `seams` compares the
autoencoder in tiles with the whole. Overrides are those of `dit4sr_pl.restore`.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path
from time import process_time

from dit4sr_pl.common.markdown import markdown_table

KNOBS = [
    "sampler.tile=16 sampler.overlap=6",
    "sampler.tile=32 sampler.overlap=12",
    "sampler.tile=64 sampler.overlap=24",
    "sampler.tile_memory=0.01",
    "sampler.tile_memory=0.2",
    "sampler.steps=10",
    "sampler.steps=40",
    "batch_size=4",
]


def main() -> None:
    """Runs the benchmark that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sizes", "knobs", "tiles", "seams", "one"])
    parser.add_argument("--sizes", nargs="+", help="SIDE or HEIGHTxWIDTH")
    parser.add_argument("--without-networks", action="store_true")
    parser.add_argument("--backbone", default="tiny-sd3")
    parser.add_argument("--overrides", nargs="*", default=[])
    args = parser.parse_args()
    if args.what == "one":
        print(*one(area(args.sizes[0]), args.without_networks, args.overrides))
    elif args.what == "seams":
        seams(args.backbone)
    elif args.what == "tiles":
        tiles()
    elif args.what == "sizes":
        sizes(args.sizes or ["512", "1024", "2048"], args.without_networks, args.overrides)
    else:
        (size,) = args.sizes or ["1024"]
        rows = []
        for knobs in KNOBS:
            seconds, memory = measured(size, args.without_networks, [*args.overrides, *knobs.split()])
            rows.append([knobs, f"{seconds / prod(area(size)) * 1e6:.2f}", f"{memory:.0f}"])
        print(markdown_table([f"{size} with", "seconds per megapixel", "peak memory, MiB"], rows))


def area(size: str) -> tuple[int, int]:
    """Returns height and width of `SIDE` or `HEIGHTxWIDTH`."""
    sides = [int(side) for side in size.split("x")]
    return sides[0], sides[-1]


def sizes(sizes: list[str], without_networks: bool, overrides: list[str]) -> None:
    """Prints time and memory of each size, and the memory that each pixel more takes."""
    before, rows = None, []
    for size in sizes:
        seconds, memory = measured(size, without_networks, overrides)
        pixels, slope = prod(area(size)), ""
        if before is not None:
            slope = f"{(memory - before[1]) * 2**20 / (pixels - before[0]):.1f}"
        before = pixels, memory
        rows.append([size, f"{seconds:.1f}", f"{seconds / pixels * 1e6:.2f}", f"{memory:.0f}", slope])
    heads = ["output", "processor seconds", "per megapixel", "peak memory, MiB", "bytes per further pixel"]
    print(markdown_table(heads, rows))


def measured(size: str, without_networks: bool, overrides: list[str]) -> tuple[float, float]:
    """Returns the result of `one` in a new process."""
    command = [sys.executable, __file__, "one", "--sizes", size, "--overrides", *overrides]
    command += ["--without-networks"] * without_networks
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, memory = map(float, result.stdout.split())
    return seconds, memory


def one(size: tuple[int, int], without_networks: bool, overrides: list[str]) -> tuple[float, float]:
    """Returns the processor seconds per image, from file to file with loaded models, and the peak memory in MiB.

    `batch_size` images go through at once.
    """
    import torch
    import torch.nn.functional as F
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from skimage.data import astronaut

    from dit4sr_pl.cli.command import conf_folder
    from dit4sr_pl.images.files import write_image
    from dit4sr_pl.images.resize import enlarge
    from dit4sr_pl.restoration.pictures import PictureRestorer
    from dit4sr_pl.restoration.reading import reading
    from dit4sr_pl.restoration.restorer import Restorer
    from dit4sr_pl.restoration.worklist import Entry

    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("restore", ["device=cpu", "sampler=tiny", *overrides])
    restorer = Restorer.load(
        instantiate(cfg.model.backbone), instantiate(cfg.sampler), cfg.checkpoint, torch.device(cfg.device), cfg.offload
    )
    if without_networks:
        vae = restorer.backbone.vae
        restorer.net.forward = lambda noisy, lr, *_: noisy - lr
        vae.encoder.forward = lambda images: F.avg_pool2d(images, 8).repeat(1, 6, 1, 1)[:, :16]
        vae.decoder.forward = lambda latents: F.interpolate(latents[:, :3], scale_factor=8)
    photo, small = torch.from_numpy(astronaut()).permute(2, 0, 1)[None] / 255, tuple(side // 4 for side in size)
    with tempfile.TemporaryDirectory() as folder:
        lr = Path(folder) / "lr.png"
        write_image(lr, enlarge(photo, small)[0])
        entries = [Entry(lr, lr.with_name(f"{i}.png"), str(i), small, alpha=False) for i in range(cfg.batch_size)]
        start = process_time()
        with reading([entries]) as read:
            outcomes = list(PictureRestorer(restorer, 4, cfg.alpha, cfg.seed).run(read, lambda _: None))
        seconds = (process_time() - start) / len(entries)
    if failures := [outcome.failure for outcome in outcomes if outcome.failure]:
        raise SystemExit(failures[0])
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def tiles() -> None:
    """Prints the values in memory at the peak of a forward pass, per token of all streams and unit of width."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dit4sr_pl.common.files import ASSETS
    from dit4sr_pl.model import DiT4SRTransformer, SD3ControlNet
    from dit4sr_pl.planning.meta_backbone import MetaBackbone
    from dit4sr_pl.planning.step_cost import CostCounter, give_storage

    rows = []
    for folder in (ASSETS / "tiny-sd3", ASSETS / "published/stabilityai/stable-diffusion-3.5-medium"):
        for kind in (DiT4SRTransformer, lambda base: SD3ControlNet(base, len(base.transformer_blocks) // 2)):
            for count, side, t5_tokens in ((1, 64, 77), (2, 64, 256), (8, 64, 256), (2, 128, 256)):
                backbone = MetaBackbone(folder, "float32")
                net = backbone.network(kind).eval()
                config, text = net.base.config, backbone.text_tokens(t5_tokens)
                with FakeTensorMode(), CostCounter() as counter, torch.no_grad():
                    give_storage(net)
                    latents = torch.empty(count, config.in_channels, side, side)
                    embeds = torch.empty(count, text, config.joint_attention_dim)
                    pooled = torch.empty(count, config.pooled_projection_dim)
                    weights = counter.peak = counter.now
                    net(latents, latents, torch.empty(count), embeds, pooled)
                tokens = count * (2 * (side // net.patch_size) ** 2 + text)
                held = (counter.peak - weights) / 4 / tokens / (config.num_attention_heads * config.attention_head_dim)
                name = f"{type(net).__name__} over {folder.name}"
                rows.append([name, f"{count} of {side}x{side}", str(t5_tokens), f"{held:.1f}"])
    print(markdown_table(["network", "tiles", "T5 tokens", "numbers per token and unit of width"], rows))


def seams(backbone: str) -> None:
    """Prints how an autoencoder in tiles differs from the whole, where tiles overlap and elsewhere."""
    import torch
    from skimage.data import astronaut

    from dit4sr_pl.backbone.sd3 import Backbone
    from dit4sr_pl.images.resize import enlarge

    side, size = 64, 1024
    coder = Backbone(backbone, "float32", t5_tokens=8).coder
    photo = enlarge(torch.from_numpy(astronaut()).permute(2, 0, 1)[None] / 255, (size, size))
    latents = coder.encode(photo)
    whole = {"encode, latents": latents, "decode, levels of 255": 255 * coder.decode(latents)}
    decoded = torch.cat(list(coder.decode_tiled(latents, side)), dim=2)
    tiled = {"encode, latents": coder.encode_tiled(photo, side), "decode, levels of 255": 255 * decoded}
    rows = []
    for name in whole:
        difference = (tiled[name] - whole[name]).abs()
        position = torch.arange(difference.shape[-1]) * size // difference.shape[-1] // coder.factor  # in latents
        seam = (position >= side * 3 // 4) & (position % (side * 3 // 4) < side // 4)
        parts = [difference[..., place] for place in ((seam | seam[:, None]), ~(seam | seam[:, None]))]
        rows.append([name, *(f"{part.max():.4f}, {part.mean():.6f}" for part in parts)])
    print(markdown_table(["", "largest, mean where tiles overlap", "largest, mean elsewhere"], rows))


if __name__ == "__main__":
    main()
