"""Few evaluations in the place of many: a student learns its teacher's trajectories, window by window.

A trajectory is the teacher's way from noise to an image, with guidance. Between two sigmas of the student, a window, it
is replaced by a straight line (piecewise rectified flow, PeRFlow, arXiv 2405.07510, without data: along the teacher's
own trajectories):

    v* = (z_k - z_{k+1}) / (sigma_k - sigma_{k+1})
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dit4sr_pl.backbone.text_encoder import Embeddings
from dit4sr_pl.training.students.module import StudentModule
from dit4sr_pl.training.students.perceptual import PerceptualLoss, crop_window, decoded


class TrajectoryStudent(StudentModule):
    """A module that trains a student of few steps. All windows of one trajectory are one batch of the student, so no
    evaluation of the teacher is left unused.

    Args:
        teaching: see `StudentModule`; its `steps` are those of the teacher over the whole trajectory.
        perceptual: makes the perceptual network, see `PerceptualLoss`.
        perceptual_weight: weight of the perceptual distance of decoded crops of the last window's result from the
            teacher's result; 0: nothing is decoded.
        crop: side of these crops in pixels.
        on_own_states: whether a window begins where the student has arrived, rather than on the teacher's trajectory,
            on which it ends. The student then runs window by window.
        training: further arguments of `StudentModule`.

    Raises:
        ValueError: the student has no sigmas or does not start from noise, the teacher's steps are no multiple of its
            windows, or the weight is negative.
    """

    def __init__(
        self,
        teaching: Mapping[str, Any],
        perceptual: Callable[[], nn.Module],
        perceptual_weight: float,
        crop: int,
        on_own_states: bool,
        **training: Any,
    ):
        super().__init__(teaching=teaching, **training)
        student = self.net.student
        if student.sigmas is None or student.start != "noise":
            raise ValueError(
                f"student.sigmas={student.sigmas}, student.start={student.start}: a student of trajectories has sigmas "
                "and starts from noise, such as student.sigmas=[1,0.9,0.75,0.5]"
            )
        if not 0 <= perceptual_weight < math.inf:
            raise ValueError(f"student.loss.perceptual={perceptual_weight}; give a number of at least 0")
        shift = self.backbone.scheduler.config.shift
        sigmas = teacher_sigmas(student.sigmas, self.teaching.steps, shift)
        self.teaching = self.teaching.changed(sigmas=sigmas)
        self.sigmas = torch.tensor([*student.sigmas, 0.0])
        self.perceptual = PerceptualLoss(perceptual) if perceptual_weight else None
        self.perceptual_weight, self.crop = perceptual_weight, max(1, crop // self.backbone.coder.factor)
        self.on_own_states = on_own_states

    def loss(self, batch: dict) -> Tensor:
        """Returns the mean over all windows of the loss between predicted and average velocity, and the perceptual
        loss of the last window's result."""
        lr_latent, prompts = self.lr_latent(batch), self.embeddings(batch)
        states = self.trajectory(lr_latent, batch["noise"], prompts)
        sigmas = self.sigmas.to(states.device)
        run = self.window_by_window if self.on_own_states else self.all_windows
        velocity, target, result = run(states, sigmas, lr_latent, prompts)
        loss = self.flow.loss_to(target, velocity, sigmas[:-1].repeat_interleave(len(lr_latent))).mean()
        if self.perceptual is None:
            return loss
        rows, columns = crop_window(result.shape[-2:], self.crop, self.seed, self.global_step)
        coder = self.backbone.coder
        taught = coder.decode(states[-1][..., rows, columns])
        distance = self.perceptual(decoded(coder, result[..., rows, columns]), taught)
        for name, part in (("velocity", loss), ("perceptual", distance)):
            self.log(f"train/{name}", part.detach())
        return loss + self.perceptual_weight * distance

    def trajectory(self, lr_latent: Tensor, noise: Tensor, prompts: Embeddings) -> Tensor:
        """Returns the teacher's states at the student's sigmas and at 0, `(K + 1, B, C, h, w)`."""
        states = self.teacher.states(self.teaching, lr_latent, noise, self.conditions(prompts))
        return torch.stack(states[:: self.teaching.steps // (len(self.sigmas) - 1)])

    def all_windows(
        self, states: Tensor, sigmas: Tensor, lr_latent: Tensor, prompts: Embeddings
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns predicted and average velocities of all windows of a trajectory, `(K * B, C, h, w)`, and the result
        of the last one, `(B, C, h, w)`."""
        noisy, count = states[:-1].flatten(0, 1), len(states) - 1
        lr_latent, embeds, pooled = (each.repeat(count, *[1] * (each.ndim - 1)) for each in (lr_latent, *prompts))
        velocity = self.predict(noisy, sigmas[:-1].repeat_interleave(states.shape[1]), lr_latent, (embeds, pooled))
        last = states.shape[1]
        return velocity, average_velocities(states, sigmas), noisy[-last:] - sigmas[-2] * velocity[-last:]

    def window_by_window(
        self, states: Tensor, sigmas: Tensor, lr_latent: Tensor, prompts: Embeddings
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what `all_windows` returns, for windows from the student's own states to the teacher's."""
        velocities, targets, own = [], [], states[0]
        for end, (sigma, following) in zip(states[1:], pairwise(sigmas), strict=True):
            velocity = self.predict(own, sigma.expand(len(own)), lr_latent, prompts)
            velocities.append(velocity)
            targets.append((own - end) / (sigma - following))
            result = own - (sigma - following) * velocity
            own = result.detach()
        return torch.cat(velocities), torch.cat(targets), result

    def predict(self, noisy: Tensor, sigma: Tensor, lr_latent: Tensor, prompts: Embeddings) -> Tensor:
        """Returns the student's velocity, `(B, C, h, w)`, float32, at sigmas `(B,)`."""
        timestep = sigma * self.backbone.scheduler.config.num_train_timesteps
        return self.velocity(noisy, lr_latent, timestep, *prompts).float()


def average_velocities(states: Tensor, sigmas: Tensor) -> Tensor:
    """Returns the average velocity of every window, `(K * B, C, h, w)`.

    Args:
        states: states at all sigmas, `(K + 1, B, C, h, w)`.
        sigmas: decreasing, `(K + 1,)`.
    """
    widths = (sigmas[:-1] - sigmas[1:]).view(-1, 1, 1, 1, 1)
    return ((states[:-1] - states[1:]) / widths).flatten(0, 1)


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
