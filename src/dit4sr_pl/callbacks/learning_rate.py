"""The learning rate over a run: warm-up, a constant part, a decay that ends with the run."""

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer


class LearningRate(Callback):
    """Warms the learning rate up, and lets it fall linearly to zero at the end of the run.

    The run ends at `trainer.max_steps` or after `trainer.max_time`, whichever comes first. A resumed run continues its
    schedule; without `trainer.max_time` the schedule is a function of the step alone.

    Args:
        peak: learning rate after the warm-up.
        warm_up: number of steps of the warm-up.
        decay: share of the run, at its end, in which the learning rate falls, in 0..1; 0 keeps it constant.

    Raises:
        ValueError: `decay` is not in 0..1.
    """

    def __init__(self, peak: float, warm_up: int, decay: float):
        if not 0 <= decay <= 1:
            raise ValueError(f"callbacks.learning_rate.decay={decay}: must be a share of the run, from 0 to 1")
        self.peak, self.warm_up, self.decay = peak, warm_up, decay

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_) -> None:
        rising = min((trainer.global_step + 1) / max(self.warm_up, 1), 1.0)
        falling = min((1 - done(trainer)) / self.decay, 1.0) if self.decay else 1.0
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.peak * rising * max(falling, 0.0)


def done(trainer: Trainer) -> float:
    """Returns the share of a run that is done, in 0..1, by its steps or by its time."""
    share = trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0
    for timer in (callback for callback in trainer.callbacks if isinstance(callback, Timer)):
        if (remaining := timer.time_remaining()) is not None:
            share = max(share, timer.time_elapsed() / max(timer.time_elapsed() + remaining, 1e-9))
    return share
