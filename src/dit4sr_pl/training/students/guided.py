"""One sequence in the place of two: a student that predicts the guided velocity, with the scale as an input.

It is the first stage of Meng et al., arXiv 2210.03142. The student keeps the teacher's flow and number of steps:

    v_student(z, sigma, s) = v(negative) + s * (v(prompt) - v(negative))
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit4sr_pl.backbone.flow import interpolate
from dit4sr_pl.common.randomness import generator
from dit4sr_pl.training.step_inputs import StepInputs
from dit4sr_pl.training.students.module import StudentModule


class GuidedStudent(StudentModule):
    """A module that trains a student at random sigmas and random scales of guidance.

    Args:
        scales: smallest and largest scale of guidance; all in between are equally likely.
        training: further arguments of `StudentModule`.

    Raises:
        ValueError: the scales are no range, or the student does not take the scale as an input.
    """

    def __init__(self, scales: Sequence[float], **training: Any):
        if not (len(scales) == 2 and math.isfinite(sum(scales)) and scales[0] < scales[1]):
            raise ValueError(f"student.scales={list(scales)}: give the smallest and the largest scale, such as [1,10]")
        super().__init__(**training)
        if self.net.student.guidance != "input":
            raise ValueError(f"student.guidance={self.net.student.guidance}: a guided student has guidance=input")
        self.step_inputs = GuidedInputs(**vars(self.step_inputs), scales=tuple(scales))

    def loss(self, batch: dict) -> Tensor:
        """Returns the loss between the student's velocity and the teacher's guided one, each at its image's scale."""
        sigma, timestep, scale = batch["sigma"], batch["timestep"], batch["scale"]
        clean, lr_latent = self.latents(batch)
        prompts = self.embeddings(batch)
        noisy = interpolate(clean, batch["noise"], sigma)
        conditions = self.teacher.conditions(prompts, self.teaching.negative_prompt)
        target = self.teacher.guided(noisy, lr_latent, timestep, conditions, scale)
        velocity = self.velocity(noisy, lr_latent, timestep, *prompts, guidance=scale)
        return self.flow.loss_to(target, velocity, sigma).mean()


@dataclass(frozen=True)
class GuidedInputs(StepInputs):
    """The inputs of a step with a random scale of guidance per image.

    Args:
        scales: smallest and largest scale.
    """

    scales: tuple[float, float] = (1.0, 1.0)

    def __call__(self, batch: dict) -> dict[str, Tensor]:
        """Returns what `StepInputs` returns, and `scale` `(B,)`."""
        draws = [generator("cpu", "guidance scale", self.seed, each) for each in batch["position"].tolist()]
        share = torch.cat([torch.rand(1, generator=draw) for draw in draws])
        smallest, largest = self.scales
        return super().__call__(batch) | {"scale": smallest + (largest - smallest) * share}
