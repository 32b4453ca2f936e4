"""python benchmarks/borders.py: what tiny-dit4sr makes of flat and shaded pictures, of clear pixels and of grey.

Prints regular patterns, borders next to the middle, and brightness by region, of the autoencoder alone, of one tile
and of tiles, so that the network's own faults and those of tiling can be told apart. It takes 3 minutes on two cores.
"""

import argparse
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from PIL import Image, ImageDraw

from dit4sr_pl.cli.command import read_conf
from dit4sr_pl.common.markdown import markdown_table
from dit4sr_pl.images.picture import Picture
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.restoration.color import COLORS
from dit4sr_pl.restoration.pictures import PictureRestorer
from dit4sr_pl.restoration.restorer import Restorer


def flat(side: int) -> torch.Tensor:
    """Returns a grey picture `(1, 3, side, side)`."""
    return torch.full((1, 3, side, side), 0.5)


def shaded(side: int) -> torch.Tensor:
    """Returns a picture that grows lighter from the top left to the bottom right."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return (0.1 + 0.4 * (rows + columns) / side).expand(1, 3, -1, -1).contiguous()


def half(side: int) -> torch.Tensor:
    """Returns a picture whose left half has level 24 and whose right half is noise."""
    picture = torch.full((1, 3, side, side), 24 / 255)
    levels = torch.randint(0, 256, (1, 3, side, side // 2), generator=torch.Generator().manual_seed(0))
    picture[..., side // 2 :] = levels / 255
    return picture


def peak(image: torch.Tensor, period: int) -> float:
    """Returns the amplitude of a period along rows, divided by the median of the ten frequencies around it."""
    spectrum = torch.fft.rfft(image - image.mean(1, keepdim=True)).abs().square().mean(0).sqrt()
    at = image.shape[1] // period
    return float(spectrum[at] / torch.cat([spectrum[at - 6 : at - 1], spectrum[at + 2 : at + 7]]).median())


def row(name: str, sr: torch.Tensor, lr: torch.Tensor) -> list[str]:
    """Returns a table's row about a restored picture `(1, 3, H, W)`; all but the peaks are in levels of 255."""
    error = 255 * (sr - enlarge(lr, tuple(sr.shape[2:])))[0]
    height = error.shape[1]
    middle = slice(height // 2 - 8, height // 2 + 8)
    rows = [error[:, chosen].abs().mean() for chosen in (slice(0, 16), middle, slice(height - 16, height))]
    peaks = [peak(error.mean(0), period) for period in (8, 16)]
    return [name, *(f"{value:.2f}" for value in (*peaks, error.std(), *rows))]


def boxes(name: str, sr: torch.Tensor) -> list[str]:
    """Returns a table's row about the flat half of `half`: means of its boxes of 64x64 pixels."""
    means = 255 * F.avg_pool2d(sr[..., : sr.shape[3] // 128 * 64], 64)[0].mean(0)
    return [name, *(f"{value:.2f}" for value in (means.min(), means.max(), means.mean()))]


def rim(restorer: Restorer) -> float:
    """Returns the darkest level of a white disk on clear black, restored x4 and laid over white."""
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).ellipse((12, 12, 52, 52), fill=255)
    alpha = torch.from_numpy(np.array(mask))[None] / 255
    picture = Picture(alpha.expand(3, -1, -1).clone(), alpha)
    (restored,) = PictureRestorer(restorer, 4, "bicubic", 0)([picture], ["disk"], [""], lambda _: None)
    return float(255 * (restored.color * restored.alpha + 1 - restored.alpha).min())


def spreads(restorer: Restorer) -> list[float]:
    """Returns the largest difference of the channels of restored grey pictures: noise, and a checkerboard."""
    noise = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0))
    checkers = torch.from_numpy(np.indices((64, 64)).sum(0) % 2)[None].float()
    worst = []
    for grey in (noise, checkers):
        picture = Picture(grey.expand(3, -1, -1).clone())
        (restored,) = PictureRestorer(restorer, 4, "bicubic", 0)([picture], ["grey"], [""], lambda _: None)
        worst.append(float(255 * (restored.color.amax(0) - restored.color.amin(0)).max()))
    return worst


def main() -> None:
    """Restores the pictures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="of the sampler")
    args = parser.parse_args()
    cfg = read_conf("restore", "sampler=tiny")
    sampler = replace(instantiate(cfg.sampler), steps=args.steps, color="none")
    restorer = Restorer.load(instantiate(cfg.model.backbone), sampler, "tiny-dit4sr", torch.device("cpu"))

    def run(lr: torch.Tensor, **options) -> torch.Tensor:
        chosen = Restorer(restorer.net, restorer.backbone, replace(sampler, **options))
        return chosen(lr, (4 * lr.shape[2], 4 * lr.shape[3]), [""], ["picture"], 0)

    def coded(lr: torch.Tensor) -> torch.Tensor:
        coder, enlarged = restorer.backbone.coder, enlarge(lr, (4 * lr.shape[2], 4 * lr.shape[3]))
        latent = coder.encode_tiled(enlarged, sampler.vae_tile)
        return torch.cat(list(coder.decode_tiled(latent, sampler.vae_tile)), dim=2)

    def reflected(lr: torch.Tensor, border: int) -> torch.Tensor:
        return run(F.pad(lr, [border] * 4, mode="reflect"))[..., 4 * border : -4 * border, 4 * border : -4 * border]

    rows = [row("flat, autoencoder alone", coded(flat(256)), flat(256))]
    rows.append(row("flat 64x64, one tile", run(flat(64)), flat(64)))
    rows.append(row("flat 256x256, tiles", run(flat(256)), flat(256)))
    rows.append(row("the same, `color=adain`", run(flat(256), color="adain"), flat(256)))
    rows.append(row("the same, continued by 16 reflected pixels and cut", reflected(flat(256), 16), flat(256)))
    rows.append(row("shaded 256x256, tiles, `color=adain`", run(shaded(256), color="adain"), shaded(256)))
    print(
        markdown_table(["picture", "period 8", "period 16", "deviation", "first rows", "middle", "last rows"], rows),
        end="\n\n",
    )
    kinds = [boxes(f"`sampler.color={color}`", run(half(192), color=color)) for color in COLORS]
    own = Restorer(restorer.net, restorer.backbone, instantiate(read_conf("restore").sampler))
    kinds.append(boxes("`sampler=tiny_sd3`", own(half(192), (768, 768), [""], ["picture"], 0)))
    print(markdown_table(["level 24 beside noise", "darkest box", "lightest box", "mean"], kinds), end="\n\n")
    print(f"rim of a white disk on clear black: {rim(own):.1f}; channels of grey differ by {spreads(own)}")


if __name__ == "__main__":
    main()
