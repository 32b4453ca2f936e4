"""The learning rate over a run: a function of the step, or of the time where that ends the run."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.optimization import SchedulerType, get_scheduler
from lightning import Trainer
from lightning.pytorch.callbacks import Timer

NAMES = tuple(scheduler.value for scheduler in SchedulerType)
WITHOUT_AN_END = ("constant", "constant_with_warmup", "piecewise_constant")


@dataclass(frozen=True)
class LearningRateSchedule:
    """The factor of the optimizer's learning rate at every step, by diffusers' schedules; nothing is saved of it.

    Args:
        name: a name of `diffusers.optimization.get_scheduler`, such as `constant` or `cosine`.
        num_warmup_steps: optimizer steps in which the factor rises from 0 to 1; not for `constant`.
        num_cycles: restarts of `cosine_with_restarts`.
        power: power of `polynomial`.
        step_rules: rules of `piecewise_constant`, such as `1:10,0.1:20,0.01`.
        decay: share of the run, at its end, in which the factor also falls linearly to 0, in 0..1; 0: it does not.

    Raises:
        ValueError: an argument is out of its range.
    """

    name: str = "constant"
    num_warmup_steps: int = 0
    num_cycles: int = 1
    power: float = 1.0
    step_rules: str | None = None
    decay: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"schedule.name={self.name}: choose one of {', '.join(NAMES)}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"schedule.decay={self.decay}: must be a share of the run, from 0 to 1")
        if self.num_warmup_steps < 0:
            raise ValueError(f"schedule.num_warmup_steps={self.num_warmup_steps}: must be 0 or more")
        if self.num_warmup_steps and self.name in ("constant", "piecewise_constant"):
            raise ValueError(
                f"schedule.num_warmup_steps={self.num_warmup_steps}: schedule.name={self.name} has no warm-up; take "
                "constant_with_warmup"
            )

    @property
    def varies(self) -> bool:
        """Whether the factor is not 1 in some step."""
        return self.name != "constant" or self.decay > 0

    def over(self, steps: int, learning_rate: float) -> Callable[[int], float]:
        """Returns the factor by optimizer steps done, without the decay.

        Args:
            steps: optimizer steps of the whole run; -1: it has no end.
            learning_rate: the optimizer's, which `polynomial` needs.

        Raises:
            ValueError: the schedule needs an end, or its rules cannot be read.
        """
        if steps < 0 and (self.name not in WITHOUT_AN_END):
            raise ValueError(f"schedule.name={self.name}: needs the number of steps; give trainer.max_steps")
        if self.name == "piecewise_constant" and not self.step_rules:
            raise ValueError("schedule.name=piecewise_constant: give schedule.step_rules, such as 1:1000,0.1:2000,0.01")
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
        scheduler = get_scheduler(
            *(self.name, optimizer, self.step_rules, self.num_warmup_steps, steps, self.num_cycles, self.power)
        )
        return scheduler.lr_lambdas[0]

    def decayed(self, done: float) -> float:
        """Returns the factor of the decay when the share `done` of the run, in 0..1, is done."""
        return max(0.0, min(1.0, (1 - done) / self.decay)) if self.decay else 1.0


CONSTANT = LearningRateSchedule()  # the paper's


def share_done(trainer: Trainer) -> float:
    """Returns the share of a run that is done, in 0..1: of its steps, or of `trainer.max_time` if that is more.

    The time is that of the first device, so that all devices take the same learning rate.
    """
    share = trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0
    for timer in (callback for callback in trainer.callbacks if isinstance(callback, Timer)):
        if (left := timer.time_remaining()) is not None:
            elapsed = timer.time_elapsed()
            share = max(share, trainer.strategy.broadcast(elapsed / max(elapsed + left, 1e-9)))
    return share
