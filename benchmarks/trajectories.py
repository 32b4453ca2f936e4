"""How exactly a student's teacher solves its trajectories, and how much the student has to learn.

    python benchmarks/trajectories.py [--teacher tiny-dit4sr] [--sigmas 1 0.9 0.75 0.5] [--photos 3] [OVERRIDE ...]

A row has the mean squared error of the average velocity in each window of the student, against the solver `dpm` in
`--exact` steps. The row before the last is the teacher's own velocity where each window begins, which is the loss that
a student starts with. LR images are those of `tiny.py`, one crop per photo.
"""

import argparse
from collections.abc import Iterator
from itertools import islice, pairwise

import torch
from hydra.utils import instantiate
from tiny import CROP, photos
from torch import Tensor

from dit4sr_pl.cli.command import read_conf
from dit4sr_pl.common.markdown import markdown_table
from dit4sr_pl.common.randomness import derive_seed, generator
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.training.students.teacher import Teacher
from dit4sr_pl.training.students.trajectories import average_velocities, teacher_sigmas

ROWS = [("euler", 8, 1), ("euler", 20, 1), ("heun", 8, 1), ("dpm", 8, 1), ("dpm", 12, 1), ("dpm", 20, 1)]
ROWS += [("unipc", 12, 1), ("unipc", 20, 1), ("dpm", 20, 2), ("dpm", 20, 5)]  # solver, steps, lr_refresh


@torch.no_grad()
def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="tiny-dit4sr")
    parser.add_argument("--sigmas", type=float, nargs="+", default=[1.0, 0.9, 0.75, 0.5])
    parser.add_argument("--photos", type=int, default=3)
    parser.add_argument("--exact", type=int, default=48, help="steps of the solution to compare with")
    parser.add_argument("overrides", nargs="*", help="of the config, such as backbone=NAME")
    args = parser.parse_args()

    backbone = instantiate(read_conf("restore", "input=unused", *args.overrides).model.backbone)
    teacher, sigmas = Teacher(backbone, args.teacher), torch.tensor([*args.sigmas, 0.0])
    lr_latent = torch.cat([backbone.coder.encode(image) for image in lr_images(args.photos)])
    noise = torch.randn(lr_latent.shape, generator=generator("cpu", "trajectories"))
    prompts = backbone.prompts([""] * len(noise), torch.device("cpu"))

    def states(solver: str, steps: int, lr_refresh: int) -> Tensor:
        """Returns the teacher's states at the student's sigmas."""
        overrides = [*args.overrides, f"sampler/solver={solver}", f"sampler.lr_refresh={lr_refresh}"]
        sampler = instantiate(read_conf("restore", "input=unused", "sampler.start=noise", *overrides).sampler)
        sampler = sampler.changed(sigmas=teacher_sigmas(args.sigmas, steps, backbone.scheduler.config.shift))
        guided = sampler.runs_negative_prompt
        conditions = teacher.conditions(prompts, sampler.negative_prompt) if guided else [prompts]
        return torch.stack(teacher.states(sampler, lr_latent, noise, conditions)[:: steps // len(args.sigmas)])

    solution = states("dpm", args.exact, 1)
    exact = average_velocities(solution, sigmas)
    timesteps = sigmas[:-1, None].expand(-1, len(noise)) * backbone.scheduler.config.num_train_timesteps
    begin = [teacher.net(z, lr_latent, t, *prompts) for z, t in zip(solution, timesteps, strict=False)]
    rows = [[*map(str, row), *by_window(average_velocities(states(*row), sigmas) - exact, sigmas)] for row in ROWS]
    rows.append(["the teacher's own", "", "", *by_window(torch.cat(begin) - exact, sigmas)])
    rows.append(["mean square", "", "", *by_window(exact, sigmas)])
    windows = [f"{begin:.2f} to {end:.2f}" for begin, end in pairwise(sigmas.tolist())]
    print(markdown_table(["solver", "steps", "lr_refresh", *windows], rows))


def lr_images(count: int) -> Iterator[Tensor]:
    """Yields the enlarged LR image of one crop of each photo, `(1, 3, CROP, CROP)`."""
    degradation = instantiate(read_conf("train", "output=unused").degradation)
    for name, hr in islice(photos(1), count):
        lr, _ = degradation(hr, degradation.draw([derive_seed(name, 0)], (CROP, CROP)))
        yield enlarge(lr, (CROP, CROP))


def by_window(velocities: Tensor, sigmas: Tensor) -> list[str]:
    """Returns the mean square of velocities `(K * B, C, h, w)` in each of K windows."""
    return [f"{each.square().mean().item():.5f}" for each in velocities.chunk(len(sigmas) - 1)]


if __name__ == "__main__":
    main()
