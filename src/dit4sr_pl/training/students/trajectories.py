"""Few evaluations in the place of many: a student learns its teacher's trajectories, window by window.

A trajectory is the teacher's way from noise to an image, with guidance. Between two sigmas of the student, a window, it
is replaced by a straight line (piecewise rectified flow, PeRFlow, arXiv 2405.07510, without data: along the teacher's
own trajectories):

    v* = (z_k - z_{k+1}) / (sigma_k - sigma_{k+1})
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dit4sr_pl.backbone.text_encoder import Embeddings
from dit4sr_pl.training.students.module import StudentModule


class TrajectoryStudent(StudentModule):
    """A module that trains a student of few steps. All windows of one trajectory are one batch of the student, so no
    evaluation of the teacher is left unused.

    Args:
        teaching: see `StudentModule`; its `steps` are those of the teacher over the whole trajectory.
        training: further arguments of `StudentModule`.

    Raises:
        ValueError: the student has no sigmas or does not start from noise, or the teacher's steps are no multiple of
            its windows.
    """

    def __init__(self, teaching: Mapping[str, Any], **training: Any):
        super().__init__(teaching=teaching, **training)
        student = self.net.student
        if student.sigmas is None or student.start != "noise":
            raise ValueError(
                f"student.sigmas={student.sigmas}, student.start={student.start}: a student of trajectories has sigmas "
                "and starts from noise, such as student.sigmas=[1,0.9,0.75,0.5]"
            )
        shift = self.backbone.scheduler.config.shift
        sigmas = teacher_sigmas(student.sigmas, self.teaching.steps, shift)
        self.teaching = self.teaching.changed(sigmas=sigmas)
        self.sigmas = torch.tensor([*student.sigmas, 0.0])

    def loss(self, batch: dict) -> Tensor:
        """Returns the mean over all windows of the loss between predicted and average velocity."""
        lr_latent, prompts = self.lr_latent(batch), self.embeddings(batch)
        states = self.trajectory(lr_latent, batch["noise"], prompts)
        sigmas = self.sigmas.to(states.device)
        noisy, target, sigma = windows(states, sigmas)
        count = len(sigmas) - 1
        timestep = sigma * self.backbone.scheduler.config.num_train_timesteps
        inputs = (each.repeat(count, *[1] * (each.ndim - 1)) for each in (lr_latent, *prompts))
        lr_latent, *prompts = inputs
        velocity = self.velocity(noisy, lr_latent, timestep, *prompts)
        return self.flow.loss_to(target, velocity, sigma).mean()

    def trajectory(self, lr_latent: Tensor, noise: Tensor, prompts: Embeddings) -> Tensor:
        """Returns the teacher's states at the student's sigmas and at 0, `(K + 1, B, C, h, w)`."""
        conditions = self.teacher.conditions(prompts, self.teaching.negative_prompt)
        states = self.teacher.states(self.teaching, lr_latent, noise, conditions)
        return torch.stack(states[:: self.teaching.steps // (len(self.sigmas) - 1)])


def windows(states: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the beginning of every window, its average velocity, both `(K * B, C, h, w)`, and its sigma `(K * B,)`.

    Args:
        states: states at all sigmas, `(K + 1, B, C, h, w)`.
        sigmas: decreasing, `(K + 1,)`.
    """
    widths = (sigmas[:-1] - sigmas[1:]).view(-1, 1, 1, 1, 1)
    target = (states[:-1] - states[1:]) / widths
    return states[:-1].flatten(0, 1), target.flatten(0, 1), sigmas[:-1].repeat_interleave(states.shape[1])


def teacher_sigmas(sigmas: Sequence[float], steps: int, shift: float) -> list[float]:
    """Returns the sigmas of a teacher's steps: as many within every window of a student, evenly as the base's scheduler
    places them.

    Args:
        sigmas: the student's.
        steps: number of the teacher's steps.
        shift: the scheduler's, `sigma = shift * t / (1 + (shift - 1) * t)` for an even t.

    Raises:
        ValueError: the steps are no multiple of the windows.
    """
    if steps % len(sigmas):
        raise ValueError(
            f"student.teaching.steps={steps}: must be a multiple of the {len(sigmas)} windows of student.sigmas"
        )
    each = steps // len(sigmas)
    times = [sigma / (shift - (shift - 1) * sigma) for sigma in (*sigmas, 0.0)]
    even = [begin + (end - begin) * step / each for begin, end in pairwise(times) for step in range(each)]
    return [shift * time / (1 + (shift - 1) * time) for time in even]
