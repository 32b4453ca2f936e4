"""The moment at which a run begins to change its folder."""

from collections.abc import Callable

from lightning import Callback, Trainer


class FirstStep(Callback):
    """Calls functions when a first batch was trained, and when a later one was; it must be the first callback.

    Until then everything was loaded and nothing of the run is written.

    Args:
        begin: called on the first device after the first batch.
        go_on: called on the first device after every further batch.
    """

    def __init__(self, begin: Callable[[], None], go_on: Callable[[], None]):
        self.begin, self.go_on, self.begun = begin, go_on, False

    def on_train_batch_end(self, trainer: Trainer, *_) -> None:
        """Calls one of the functions."""
        if trainer.is_global_zero:
            self.go_on() if self.begun else self.begin()
        self.begun = True
