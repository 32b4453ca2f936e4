"""Figures of the shipped tiny-sd3 and tiny-dit4sr on photos that neither was trained on.

    python benchmarks/tiny.py [--backbone outputs/tiny/base/tiny-sd3] [--checkpoint outputs/.../lr_stream.safetensors]
        [sampler.steps=20 ...]

Every 128x128 crop of a grid over every photo that scikit-image and scikit-learn ship; x4, `light` degradation. A
photo's score is the mean over its crops, the figure the mean over photos. PSNR is of RGB, unlike the Y channel of
`dit4sr_pl.scores.metrics`: it measures the autoencoder too. `sr / bicubic` is the ratio of the ST-LPIPS columns.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.randomness import derive_seed
from dit4sr_pl.data.demo_photos import write_demo_photos
from dit4sr_pl.images.files import find_images, read_image
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.restoration.restorer import Restorer
from dit4sr_pl.scores.pyiqa_loading import create

CROP = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="tiny-dit4sr")
    parser.add_argument("--backbone", default="tiny-sd3", help="folder of another base")
    parser.add_argument("--sampler", default="tiny_sd3", help="name in conf/sampler/; that of restoring by default")
    parser.add_argument("--injection-scale", type=float, help="default: the checkpoint's")
    parser.add_argument("--crops", type=int, default=16, help="at most, per photo: evenly spread over its grid")
    parser.add_argument("--vae-only", action="store_true")
    parser.add_argument("overrides", nargs="*", help="of the sampler, such as sampler.color=adain")
    args = parser.parse_intermixed_args()

    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        chosen = f"sampler={args.sampler}", f"model.backbone.name={args.backbone}", *args.overrides
        cfg = compose("train", ["output=unused", *chosen])
    backbone = instantiate(cfg.model.backbone)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    degradation, stlpips = instantiate(cfg.degradation), create("stlpips")
    backbone.to(device)
    names, restorer = ("vae",), None
    if not args.vae_only:
        names, options = ("vae", "bicubic", "sr"), {"injection_scale": args.injection_scale}
        restorer = Restorer.load(backbone, instantiate(cfg.sampler), args.checkpoint, device, **options)

    print(f"{'photo':18s} {'crops':>5s}" + "".join(f"{n + ' psnr':>14s}{n + ' stlpips':>16s}" for n in names))
    rows = []
    for name, hr in photos(args.crops):
        images = {"vae": backbone.coder.decode(backbone.coder.encode(hr.to(device))).cpu()}
        if restorer:
            lr, _ = degradation(hr, degradation.draw([derive_seed(name, i) for i in range(len(hr))], (CROP, CROP)))
            images["bicubic"] = enlarge(lr, (CROP, CROP))
            images["sr"] = restorer(lr, (CROP, CROP), [""] * len(hr), [f"{name}{i}" for i in range(len(hr))], 0).cpu()
        scores = [score for n in names for score in (psnr(images[n], hr), stlpips(images[n], hr).mean().item())]
        rows.append(scores)
        report(name, len(hr), scores)
    means = torch.tensor(rows).mean(dim=0).tolist()
    report("mean over photos", 0, means)
    if restorer:
        print(f"ST-LPIPS sr / bicubic {means[5] / means[3]:.3f}; PSNR sr - bicubic {means[4] - means[2]:+.2f} dB")


def photos(limit: int, crop: int = CROP):
    """Yields a photo's name and crops `(B, 3, crop, crop)` in 0..1; smaller photos are left out."""
    with tempfile.TemporaryDirectory() as folder:
        write_demo_photos(folder)
        for path in find_images(Path(folder)):
            image = read_image(path) / 255
            height, width = (side // crop * crop for side in image.shape[1:])
            if not height or not width:
                continue
            top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
            grid = image[:, top : top + height, left : left + width].unfold(1, crop, crop).unfold(2, crop, crop)
            crops = grid.permute(1, 2, 0, 3, 4).flatten(0, 1)
            yield path.stem, crops[torch.linspace(0, len(crops) - 1, min(limit, len(crops))).round().long()]


def psnr(images: Tensor, hr: Tensor) -> float:
    mse = (images - hr).square().mean(dim=(1, 2, 3))
    return (-10 * mse.clamp(min=1e-6).log10()).mean().item()


def report(name: str, count: int, scores: list[float]) -> None:
    values = "".join(f"{score:{16 if i % 2 else 14}.3f}" for i, score in enumerate(scores))
    print(f"{name:18s} {count or '':>5}" + values, flush=True)


if __name__ == "__main__":
    main()
