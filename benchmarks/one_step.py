"""Short trainings of students of one step, each with other losses, scored on held-out crops next to their teacher.

    python scripts/tiny_pairs.py --photos PHOTOS --pipeline src/dit4sr_pl/assets/tiny-sd3 --output outputs/tiny/pairs
    python benchmarks/one_step.py --pairs outputs/tiny/pairs --steps 40 "" score=1 target_score=1 perceptual=2

Every word is one training of tiny-dit4sr's student: losses by name, joined by commas, with the latent loss at weight 1.
`--options` adds overrides to all of them. All trainings get the same crops. One crop of 128x128 of each photo that
scikit-image and scikit-learn ship is scored, x4, `light` degradation; PSNR is of RGB.
"""

import argparse
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from tiny import CROP, photos, psnr
from torch import Tensor, nn

from dit4sr_pl.cli.command import conf_folder
from dit4sr_pl.common.randomness import derive_seed, generator
from dit4sr_pl.restoration.restorer import Restorer
from dit4sr_pl.scores.pyiqa_loading import create
from dit4sr_pl.training.students.one_step import OneStepStudent

BATCH, SIDE, LEARNING_RATE = 4, CROP // 8, 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("losses", nargs="+")
    parser.add_argument("--pairs", type=Path, default=Path("outputs/tiny/pairs"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--options", nargs="*", default=[])
    args = parser.parse_args()
    cfg, stlpips = config(""), create("stlpips")
    lr, hr = held_out(cfg)
    hr_latents, lr_latents = (read(args.pairs / kind) for kind in ("latent_hr", "latent_lr"))

    def report(name: str, restorer: Restorer, seconds: float) -> None:
        sr = restorer(lr, (CROP, CROP), [""] * len(lr), [str(image) for image in range(len(lr))], 0)
        scores = f"PSNR {psnr(sr, hr):.3f}  ST-LPIPS {stlpips(sr, hr).mean():.4f}"
        print(f"{name:40s} {scores}  {seconds:.0f} s of processor time", flush=True)

    backbone = instantiate(cfg.model.backbone)
    report("teacher", Restorer.load(backbone, instantiate(cfg.sampler), "tiny-dit4sr", torch.device("cpu")), 0)
    for losses in args.losses:
        module = instantiate(config(losses, *args.options).model)
        start = time.process_time()
        train(module, hr_latents, lr_latents, args.steps)
        report(losses or "latent alone", module.restorer, time.process_time() - start)


def config(losses: str, *options: str) -> DictConfig:
    """Returns the config of a training, without LoRA and with no other losses than the given ones."""
    off = ["student.loss.perceptual=0", "student.loss.score=0", "student.lora_rank=0", "student.crop=64"]
    given = [f"student.loss.{loss}" for loss in losses.split(",") if loss]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        words = ["experiment=tiny_student_1", "output=unused", "model.compile=false", *off, "student.loss.latent=1"]
        return compose("train", [*words, *given, *options])


def held_out(cfg: DictConfig) -> tuple[Tensor, Tensor]:
    """Returns LR images and HR crops, one of each photo."""
    degradation, hr = instantiate(cfg.degradation), {name: crops[:1] for name, crops in photos(1)}
    lr = [degradation(crop, degradation.draw([derive_seed(name, 0)], (CROP, CROP)))[0] for name, crop in hr.items()]
    return torch.cat(lr), torch.cat(list(hr.values()))


def read(folder: Path) -> Tensor:
    """Returns all latents in a folder, `(N, C, h, w)`."""
    return torch.cat([torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]).float()


def train(module: OneStepStudent, hr: Tensor, lr: Tensor, steps: int) -> None:
    """Trains a student on random crops, with a learning rate that rises over 5 steps and falls at the end."""
    module.log = lambda *_: None
    parts: list[nn.Module] = [module.net.trained, *([module.critic_lora] if module.critic else [])]
    optimizer = torch.optim.AdamW([{"params": list(part.parameters())} for part in parts], LEARNING_RATE)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 5) * min(1, (steps - step) / (0.4 * steps))
        draws = generator("cpu", "mini", step)
        images = torch.randint(len(hr), (BATCH,), generator=draws)
        top, left = (int(torch.randint(hr.shape[-1] - SIDE + 1, (), generator=draws)) for _ in range(2))
        window = images, slice(None), slice(top, top + SIDE), slice(left, left + SIDE)
        batch = {"clean": hr[window], "lr_latent": lr[window], "prompt": [""] * BATCH}
        batch["position"] = torch.arange(BATCH) + step * BATCH
        loss = module.loss(batch | module.step_inputs(batch))
        optimizer.zero_grad()
        loss.backward()
        module.configure_gradient_clipping(optimizer, 1.0, "norm")
        optimizer.step()


if __name__ == "__main__":
    main()
